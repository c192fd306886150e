"""LoRA in both stages: the script runs, and its pictures, its count of colours and its count of bytes are right."""

import re

import lora_text_to_image as example
import pytest
import torch
from torch import nn


def test_both_stages_run_and_a_second_base_is_what_sharing_saves(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        example.main(["--base-steps=1", "--steps=2"])
    printed = capsys.readouterr().out
    assert re.findall(r"(the base|adapter of stage \d) \d+ of 48 images", printed) == [
        *("the base", "adapter of stage 1", "adapter of stage 2"),
    ]
    shared, second = (float(value) for value in re.findall(r"([\d.]+) MiB", printed))
    adapters = shared - (second - shared)  # of student and teacher, beside the one base
    assert 0 < adapters < 0.5 * shared


def test_a_caption_is_drawn_in_its_colour_and_counted() -> None:
    with torch.random.fork_rng():
        images = example.drawn(example.CAPTIONS * 4)

    class Knowing(nn.Linear):  # whose velocity leads to the images from any noise, or to those of the captions before
        shift = 0

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **text: torch.Tensor) -> object:
            sigma = timestep[0] / 1000
            return type("", (), {"sample": (hidden_states - images.roll(self.shift, 0)) / sigma})

    model = Knowing(1, 1)
    assert example.right_colours(model) == "48 of 48 images"
    model.shift = len(example.SHAPES)
    assert example.right_colours(model) == "0 of 48 images"


def test_what_models_share_counts_once() -> None:
    first, second = nn.Linear(4, 2), nn.Linear(4, 2)
    second.weight = first.weight
    assert example.memory(first, second) == 4 * (8 + 2 + 2)
