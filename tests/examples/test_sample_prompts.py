"""Images for prompts at a tiny size: guided from the empty prompt, and made once."""

import json
from pathlib import Path

import numpy as np
import pytest
import sample_prompts
import torch
from common.demo import TEXT_LENGTH, TEXT_WIDTH
from common.loading import mmdit_from_checkpoint
from common.options import Mistake
from common.samplers import image_generator
from common.text import load_text_encoder
from common.vae import decode, load_vae
from PIL import Image
from tiny_runs import write_prompt_run
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPTS = ("a red ring on a blue ground", "white ground with a black cross", "a green circle on a red ground")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompt_run(tmp_path_factory.mktemp("runs") / "self", 2, 4)


def sample(run: Path, out: Path, *more: str) -> Path:
    given = [f"--out={out}", "--steps=2", "--device=cpu", "--prompts", *PROMPTS]
    return sample_prompts.main(["--checkpoint", str(run), *given, *more])


def changed_encoder(run: Path, folder: Path, **changes: int) -> Path:
    """A text encoder with the same tokenizer, other weights, and of another size if that is asked for."""
    config = CLIPTextModel.from_pretrained(run / "text_encoder").config.to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        CLIPTextModel(CLIPTextConfig(**(config | changes))).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(run / "text_encoder").save_pretrained(folder)
    return folder


def test_images_are_guided_from_the_empty_prompt_by_the_formula(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path / "s", "--sampler=euler", "--cfg-scale=3", "--guidance-high=0.7", "--seed=7")
    model, _ = mmdit_from_checkpoint(run / "checkpoints/0000004.pt")
    features = load_text_encoder(str(run / "text_encoder")).encode(["", *PROMPTS])
    for number in range(3):
        x = torch.randn(4, 4, 4, generator=image_generator(7, number))[None].double()
        for t in (1.0, 0.5):  # two Euler steps; guidance acts in the second alone
            v_u, v_c = (model(x.float(), torch.tensor([t]), features[i : i + 1]).double() for i in (0, number + 1))
            x = x - 0.5 * (v_u + 3 * (v_c - v_u) if t <= 0.7 else v_c)
        expected = decode(load_vae(run / "vae"), x.float())[0].permute(1, 2, 0)
        found = np.asarray(Image.open(tmp_path / f"s/images/{number:06d}.png")).astype(np.float64)
        assert np.abs(found - (127.5 * expected.numpy() + 127.5)).max() <= 1.5  # rounding


def test_only_what_is_missing_is_made_and_another_runs_folder_is_never_written_over(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    sample(run, out, "--sampler=sde", "--batch-size=2")
    images = {path: path.read_bytes() for path in (out / "images").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in images}
    assert len(images) == 3
    (out / "images/000001.png").unlink()
    sample(run, out, "--sampler=sde", "--batch-size=2")
    assert {path: path.read_bytes() for path in images} == images
    assert [path.name for path in images if path.stat().st_mtime_ns != times[path]] == ["000001.png"]
    other = changed_encoder(run, tmp_path / "other")
    for more, match in [
        ("--seed=1", "seed: 0 there, 1 now"),
        ("--weights=model", "weights: "),
        (f"--text-encoder={other}", "text_encoder_weights"),
    ]:
        with pytest.raises(Mistake, match=rf"other settings(.|\n)*{match}"):
            sample(run, out, "--sampler=sde", more)
    assert {path: path.read_bytes() for path in images} == images


def test_prompts_of_a_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ring\na green cross\n")
    given = [f"--checkpoint={run / 'checkpoints/0000002.pt'}", f"--prompts-file={tmp_path / 'prompts.txt'}"]
    assert sample_prompts.main([*given, f"--out={tmp_path / 's'}", "--steps=1", "--device=cpu"]).exists()
    settings = json.loads((tmp_path / "s/settings.json").read_text())
    assert (settings["prompts"], settings["steps_trained"]) == (["a red ring", "a green cross"], 2)
    assert len(list((tmp_path / "s/images").iterdir())) == 2


def test_a_text_encoder_of_another_width_is_named(run: Path, tmp_path: Path) -> None:
    narrow = changed_encoder(run, tmp_path / "narrow", hidden_size=12, intermediate_size=12, num_attention_heads=2)
    found = f"{TEXT_LENGTH} tokens of width 12 a text; .*0000004.pt has {TEXT_LENGTH} of width {TEXT_WIDTH}"
    with pytest.raises(Mistake, match=found):
        sample(run, tmp_path / "s", f"--text-encoder={narrow}")
    assert not (tmp_path / "s").exists()
