"""Loading a SiT from the files of this repository's trainer, of REPA and of the SiT repository."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from common.loading import check_claims, sit_from_checkpoint
from common.options import Mistake
from common.sit import SIZES, SiT
from common.vae import Scaling
from torch import Tensor

from selftrans_reg import CheckpointError

State = dict[str, Tensor]
Sizes = dict[str, tuple[int, int, int]]
TINY = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
    "class_dropout_prob": 0.1, "learn_sigma": False, "qk_norm": False,
}  # fmt: skip
OURS = TINY | {"model": "demo", "path": "cosine", "data": "x", "scale_factor": 0.5, "vae": None}
SIT_FILE = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}
REPA_FILE = {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v", "cfg_prob": 0.1}
OTHERS = {"path": "/data/imagenet", "time": "12:00:00", "family": "transformer"}  # their words for something else


def state(seed: int = 0, **settings: Any) -> State:
    """The weights of a SiT without a zero among them."""
    generator = torch.Generator().manual_seed(seed)
    model = SiT(**(TINY | settings))
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def same(model: SiT, expected: State) -> bool:
    own = model.state_dict()
    return own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> Sizes:
    """Publishes smaller sizes: a quarter of the depth, a sixteenth of the width, half of the heads."""
    small = {size: (depth // 4, width // 16, heads // 2) for size, (depth, width, heads) in SIZES.items()}
    monkeypatch.setattr("common.sit.SIZES", small)
    monkeypatch.setattr("common.loading.SIZES", small)
    return small


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("weights", ["ema", "model"])
@pytest.mark.parametrize(
    "settings", [{}, {"learn_sigma": True, "qk_norm": True, "mlp_ratio": 3.0, "input_size": 6, "patch_size": 1}]
)
def test_a_file_of_our_trainer_comes_back_whole(tmp_path: Path, weights: str, settings: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        content = {"model": state(0, **settings), "ema": state(1, **settings), "opt": {}}
    path = saved(tmp_path, content | {"steps": 70, "args": OURS | settings})
    model, found = sit_from_checkpoint(path, weights=weights)
    assert same(model, content[weights])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert found.settings == TINY | {"mlp_ratio": 4.0} | settings
    assert model.blocks[0].attn.num_heads == 2
    assert (found.entry, found.steps, *found.conventions()) == (weights, 70, "repa", "cosine")
    assert found.args == OURS | settings


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4])
def test_a_bare_state_dict_of_a_published_size_needs_nothing_said(
    tmp_path: Path, small_sizes: Sizes, size: str, patch: int
) -> None:
    depth, width, heads = small_sizes[size]
    settings = {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch}
    settings |= {"num_classes": 1000, "in_channels": 4, "input_size": 16, "learn_sigma": True}
    model, found = sit_from_checkpoint(saved(tmp_path, state(**settings)))
    assert same(model, state(**settings))
    assert found.settings == TINY | settings | {"mlp_ratio": 4.0}
    assert (found.entry, found.steps, found.args) == (None, None, {})
    with pytest.raises(Mistake, match=rf"patch_size: {patch} there, {6 - patch} said"):
        sit_from_checkpoint(saved(tmp_path, {"ema": state(**settings), "args": {"model": f"SiT-{size}/{6 - patch}"}}))


def test_repas_file_with_its_namespace_and_heads(tmp_path: Path, small_sizes: Sizes) -> None:
    depth, width, num_heads = small_sizes["B"]
    args = argparse.Namespace(**REPA_FILE | {"model": "SiT-B/2", "num_classes": 5, "qk_norm": True, "resolution": 256})
    weights = state(depth=depth, hidden_size=width, num_heads=num_heads, qk_norm=True)
    heads = {name: torch.zeros(2, 2) for name in ("projectors.0.0.weight", "projectors_final.linear.bias")}
    content = {"model": weights, "ema": weights | heads, "opt": {"state": {}}, "args": args, "steps": 400_000}
    model, found = sit_from_checkpoint(saved(tmp_path, content))
    assert same(model, weights)
    assert (found.entry, found.steps, *found.conventions(said_time="repa")) == ("ema", 400_000, "repa", "linear")
    assert (found.settings["num_heads"], found.settings["class_dropout_prob"]) == (6, 0.1)


@pytest.mark.parametrize(
    ("args", "known", "expected"),
    [
        (OURS, {}, ("repa", "cosine")),
        (OURS, {"scaling": Scaling(0.500001), "settings": TINY | {"class_dropout_prob": 0.2}}, ("repa", "cosine")),
        (REPA_FILE, {"said_time": "repa", "time": "repa", "scaling": Scaling(0.18215)}, ("repa", "linear")),
        (SIT_FILE | OTHERS, {"said_time": "sit"}, ("sit", "linear")),
        (SIT_FILE | {"path_type": "GVP"}, {"said_time": "sit"}, ("sit", "cosine")),
        ({}, {"said_time": "repa", "said_path": "cosine"}, ("repa", "cosine")),
        ({}, {"said_time": "repa", "path": "cosine"}, ("repa", "cosine")),
        (OURS | {"model": "DiT-XL/2"}, {}, "x.pt was trained as a 'DiT-XL/2', and is taken for a SiT"),
        (OURS | {"family": "MMDiT"}, {}, "trained as a 'MMDiT'"),
        (OURS | {"prediction": "noise"}, {}, "trained to predict 'noise'"),
        (SIT_FILE | {"path_type": ["GVP"]}, {"said_time": "sit"}, r"trained on the path \['GVP'\]"),
        (OURS, {"said_path": "linear"}, r"trained on the cosine path.\nFound: --path linear"),
        (OURS, {"path": "linear"}, "trained on the cosine path; this run is on the linear path"),
        (REPA_FILE, {"said_time": "repa", "path": "cosine"}, "linear path; this run is on the cosine path"),
        (OURS | {"shift_factor": 3.0}, {"scaling": Scaling(0.5)}, "scale 0.5, shift 3.0; here they have scale 0.5"),
        (OURS | {"scale_factor": "large"}, {"scaling": Scaling(0.18215)}, "that no latents can have: .*large"),
        (SIT_FILE, {"option": "--file-time"}, "does not say what its training called t(.|\\n)*--file-time repa"),
        (OURS, {"said_time": "sit"}, r"in the convention 'repa'.\nFound: --time sit. Leave it out"),
        (SIT_FILE, {"said_time": "sit", "time": "repa"}, "1 is data.; this run is with the time of 'repa' "),
        (OURS, {"settings": TINY | {"num_heads": 4}}, "num_heads: 2 there, 4 here"),
        (REPA_FILE, {"said_time": "repa", "settings": {"num_heads": 12}}, "num_heads: 16 there, 12 here"),
    ],
)
def test_what_a_file_says_is_completed_or_what_does_not_hold_is_named(
    args: dict[str, Any], known: dict[str, Any], expected: str | tuple[str, str]
) -> None:
    with pytest.raises(Mistake, match=expected) if isinstance(expected, str) else nullcontext():
        assert check_claims("x.pt", args, "SiT", **known) == expected


def test_what_shapes_do_not_show_is_asked_for(tmp_path: Path) -> None:
    def load(**said: int) -> dict[str, Any]:
        return sit_from_checkpoint(saved(tmp_path, {"ema": state(), "args": said}))[1].settings

    for said, match in [
        ({"num_classes": 5}, r"not say its num_heads(.|\n)*depth 2 and hidden_size 16, no published size"),
        ({"num_heads": 2}, r"not say its num_classes(.|\n)*class table of 6 rows, whose last may be"),
        ({"num_heads": 2, "num_classes": 7}, r"class table that does not fit(.|\n)*6 rows; num_classes=7"),
    ]:
        with pytest.raises(Mistake, match=match):
            load(**said)
    assert load(num_heads=2, num_classes=5)["class_dropout_prob"] > 0
    assert load(num_heads=2, num_classes=6)["class_dropout_prob"] == 0
    with pytest.raises(Mistake, match=r"5 rows; num_classes=5, label dropout 0.1"):
        sit_from_checkpoint(saved(tmp_path, {"ema": state(class_dropout_prob=0.0), "args": OURS}))


def test_files_that_hold_no_sit_or_contradict_themselves_are_named(tmp_path: Path) -> None:
    weights = state()
    huge = state(hidden_size=4, num_heads=1) | {"x_embedder.proj.weight": torch.ones(40_000, 3, 2, 2)}
    for content, match in [
        ({"layer.weight": torch.ones(2)}, r"holds no SiT: it has no x_embedder(.|\n)*Found: 'layer.weight'"),
        (weights | {"pos_embed": torch.ones(1, 15, 16)}, "no SiT on square latents: the shapes do not go together"),
        (weights | {"x_embedder.proj.weight": torch.ones(16, 12)}, "the shapes do not go together"),
        (weights | {"final_layer.linear.weight": torch.ones(5, 16)}, "the shapes do not go together"),
        (weights | {"blocks.0.attn.q_norm.weight": torch.ones(5)}, "the shapes do not go together"),
        ({"ema": weights, "args": 3}, "under 'args' a int"),
        ({"ema": weights, "args": OURS | {"depth": 3}}, r"than its own settings say.\nFound: depth: 2 there, 3 said"),
        ({"ema": weights, "args": OURS | {"learn_sigma": True}}, "learn_sigma: False there, True said"),
        ({"ema": weights, "args": OURS | {"input_size": 16}}, "input_size: 8 there, 16 said"),
        ({"ema": weights, "args": OURS | {"num_heads": 0}}, r"no SiT can have.\nFound: num_heads: 0"),
        ({"ema": weights, "args": OURS | {"depth": [2]}}, r"no SiT can have.\nFound: depth: \[2\]"),
        # Refused by shapes, before a block of 1.6 billion weights is made.
        (huge | {"args": {"num_heads": 1, "num_classes": 5}}, r"a SiT of [\d,]* weights, and holds 481,936"),
    ]:
        with pytest.raises(Mistake, match=match):
            sit_from_checkpoint(saved(tmp_path, content))
    del weights["blocks.1.mlp.fc1.bias"]
    with pytest.raises(CheckpointError, match=r"Missing, of the model's 32 \(1\):\n  blocks.1.mlp.fc1.bias \(64,\)"):
        sit_from_checkpoint(saved(tmp_path, {"ema": weights, "args": OURS}))
