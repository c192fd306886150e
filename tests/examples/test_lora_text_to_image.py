"""LoRA in both stages: the script runs, and its pictures, and its counts of colours and of bytes are right."""

import re
from types import SimpleNamespace

import lora_text_to_image as example
import pytest
import torch
from torch import nn


def test_both_stages_run_and_a_second_base_is_what_sharing_saves(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        example.main(["--base-steps=1", "--steps=2"])
    printed = capsys.readouterr().out
    assert re.findall(r"(base|stage \d) \d+ of 48 images", printed) == ["base", "stage 1", "stage 2"]
    shared, second = (float(value) for value in re.findall(r"([\d.]+) MiB", printed))
    adapters = shared - (second - shared)  # of student and teacher, beside the one base
    assert 0 < adapters < 0.5 * shared


def test_a_caption_is_drawn_in_its_colour_and_counted() -> None:
    with torch.random.fork_rng():
        images = example.drawn(example.CAPTIONS * 4)

    model = nn.Linear(1, 1)  # whose velocity leads to these images from any noise
    model.forward = lambda hidden_states, timestep, **text: SimpleNamespace(
        sample=1000 * (hidden_states - images) / timestep[0]
    )
    assert example.right_colours(model) == "48 of 48 images"
    images = images.roll(len(example.SHAPES), 0)  # of captions of another colour
    assert example.right_colours(model) == "0 of 48 images"
