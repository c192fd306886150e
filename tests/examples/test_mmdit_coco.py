"""The text-to-image runs at a tiny size: every stage against its formula, the teacher, pictures, what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mmdit_coco
import numpy as np
import pytest
import sample_prompts
import torch
from common.coco_features import CocoFeatures
from common.demo import TEXT_ENCODER, TEXT_LENGTH, TEXT_WIDTH, VAE, captioned_shapes, save_text_encoder
from common.loading import mmdit_from_checkpoint
from common.mmdit import MMDiT
from common.options import Mistake
from common.text import load_text_encoder
from common.vae import Scaling, load_vae
from long_runs import checkpoint, lines, own_state
from torch import Tensor

import selftrans_reg as st

IMAGES = 32
TINY = [
    "--data=demo", f"--demo-images={IMAGES}", "--demo-vae-steps=2", "--batch-size=4", "--checkpoint-every=2",
    "--log-every=1", "--warmup-steps=4", "--head-features=16", "--cpu", "--steps=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with own_state():
        yield


def stage_2(runs: Path) -> list[str]:
    teacher = f"--teacher={runs / 'stage1/teacher'}"
    return ["--stage=2", f"--out={runs / 'stage2'}", teacher, "--stop-step=3", *TINY]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs beside the demo's data, at a quarter of its width: both stages, four steps each."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmdit_coco, "DEMO_SIZE", {"patch_size": 2, "hidden_size": 24, "depth": 6, "num_heads": 3})
        with own_state():
            mmdit_coco.main(["--stage=1", f"--out={runs / 'stage1'}", *TINY])
            mmdit_coco.main(stage_2(runs))
        yield runs


def image_tokens(model: MMDiT, block: int, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The second of the two that a block returns."""
    seen: list[Tensor] = []
    hook = model.joint_blocks[block].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with torch.no_grad():
        model(x, t, context=context)
    hook.remove()
    return seen[0]


def test_the_demos_data_is_u_vits_layout_of_what_was_drawn(runs: Path) -> None:
    folder = runs / "demo-captions"
    data = CocoFeatures(folder, dropout=0.0)
    encoder, vae = load_text_encoder(str(folder / TEXT_ENCODER)), load_vae(folder / VAE)
    torch.testing.assert_close(data.empty, encoder.encode([""])[0], rtol=1e-4, atol=1e-5)
    assert data.scaling == Scaling(vae.config.scaling_factor)
    drawn = captioned_shapes(IMAGES)
    mean, std, context = data[IMAGES - 1]
    posterior = vae.encode(drawn.images[-1:]).latent_dist
    torch.testing.assert_close(mean, posterior.mean[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(std, posterior.std[0], rtol=1e-3, atol=1e-4)
    captions = encoder.encode(drawn.captions[-1])
    assert any(torch.allclose(context, caption, atol=1e-4) for caption in captions)


def test_what_the_stages_leave(runs: Path) -> None:
    for line in lines(runs / "stage1"):
        assert line["alignment"] > 0
        assert line["in_window"] == 1  # no window: every t
        assert line["loss"] == pytest.approx(line["denoising"] + 0.5 * line["alignment"])
    assert [line["lr"] for line in lines(runs / "stage1")] == pytest.approx([2e-3 * k / 4 for k in (1, 2, 3, 4)])
    assert [line["alignment"] > 0 for line in lines(runs / "stage2")] == [True, True, True, False]
    assert lines(runs / "stage1")[0]["denoising"] == lines(runs / "stage2")[0]["denoising"]
    assert not (runs / "stage2/teacher").exists()
    saved = torch.load(checkpoint(runs / "stage1", 4))
    expected = {
        "model": "demo", "stage": "1", "input_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 24,
        "depth": 6, "num_heads": 3, "context_length": TEXT_LENGTH, "context_size": TEXT_WIDTH, "path": "linear",
        "vae": str(runs / "demo-captions" / VAE), "text_encoder": str(runs / "demo-captions" / TEXT_ENCODER),
    }  # fmt: skip
    assert {name: saved["args"][name] for name in expected} == expected
    (group,) = saved["opt"]["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.9), 0.03)


def test_stage_2_regresses_the_averages_guided_image_stream(runs: Path, generator: torch.Generator) -> None:
    """The teacher, and the term of a checkpoint's model and head, written out over the tokens of the image."""
    empty = torch.from_numpy(np.load(runs / "demo-captions/empty_context.npy"))
    taught_by, found = mmdit_from_checkpoint(checkpoint(runs / "stage1", 4))
    teacher = st.CFGFeatureTeacher.from_pretrained(runs / "stage1/teacher", model=MMDiT(**found.settings))
    assert (teacher.layer, teacher.guidance_scale, teacher.select) == ("joint_blocks.3", 5.0, 1)
    assert torch.equal(teacher.null["context"], empty)
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    t, context = torch.rand(2, generator=generator), torch.randn(2, *empty.shape, generator=generator)
    x_t = torch.lerp(x, noise, t.view(-1, 1, 1, 1))
    f_c, f_u = (image_tokens(taught_by, 3, x_t, t, text) for text in (context, empty.expand_as(context)))
    torch.testing.assert_close(teacher(x_t, t, context=context), f_u + 5 * (f_c - f_u), rtol=1e-4, atol=1e-4)

    trainer, content = mmdit_coco.main(stage_2(runs)), torch.load(checkpoint(runs / "stage2", 2))  # the run is finished
    model, criterion = trainer.model, trainer.criterion
    model.load_state_dict(content["model"])
    criterion.load_state_dict(content["criterion"])
    model(x_t, t, context=context)
    terms = criterion(torch.zeros(()), latents=x, step=2)
    projected = criterion.heads[0](image_tokens(model, 2, x_t, t, context))
    expected = (projected - f_u - 5 * (f_c - f_u)).square().mean()
    torch.testing.assert_close(terms.alignment, expected.detach(), rtol=1e-3, atol=1e-4)


def test_the_published_settings_are_the_defaults(tmp_path: Path) -> None:
    found = {}
    for stage, more in {"baseline": [], "1": [], "2": [f"--teacher={tmp_path}"]}.items():
        run = mmdit_coco.options(["--data=coco", f"--out={tmp_path / 'run'}", f"--stage={stage}", *more])
        mmdit_coco.settle_mmdit(run)
        found[stage] = run
        assert (run.lr, run.betas, run.weight_decay, run.warmup_steps) == (2e-4, [0.9, 0.9], 0.03, 5_000)
        assert (run.batch_size, run.ema_decay, run.clip, run.context_dropout) == (256, 0.9999, 1.0, 0.1)
        assert (run.steps, run.model) == (150_000, "MMDiT")
    one, two = found["1"], found["2"]
    assert (one.layer, one.teacher_layer, one.guidance_scale) == ("joint_blocks.3", "joint_blocks.15", 5.0)
    assert (one.window, one.weight, one.stop_step, one.teacher_weights) == ("all", 0.5, 0, "ema")
    assert (two.layer, two.window, two.weight, two.stop_step) == ("joint_blocks.11", "all", 0.5, 50_000)
    assert (found["baseline"].layer, found["baseline"].weight) == (None, None)


def test_a_teacher_of_other_data_is_named(runs: Path, tmp_path: Path) -> None:
    features, path, taught = tmp_path / "features", tmp_path / "theirs.pt", runs / "stage1/teacher"
    # A copy of the demo's, to be spoilt, which nothing says are the demo's.
    shutil.copytree(runs / "demo-captions", features, ignore=shutil.ignore_patterns("settings.json"))

    def refused(teacher: Path, match: str) -> None:
        given = [f"--data={features}", f"--teacher={teacher}", "--model=demo", "--workers=0", "--cpu"]
        with pytest.raises(Mistake, match=match):
            mmdit_coco.main(["--stage=2", f"--out={tmp_path / 'run'}", *given])

    empty, facts = np.load(features / "empty_context.npy"), json.loads((features / "features.json").read_text())
    np.save(features / "empty_context.npy", empty + 1)
    refused(taught, r"other data(.|\n)*another null condition, context.\n.*same data")
    np.save(features / "empty_context.npy", empty)
    (features / "features.json").write_text(json.dumps(facts | {"scale": 0.18215}))
    refused(taught, r"other data(.|\n)*latents have scale 0\..*and here scale 0.18215, shift 0.0")
    (features / "features.json").write_text(json.dumps(facts))
    content = torch.load(checkpoint(runs / "stage1", 4))
    for said, match in [
        ({"num_heads": 6}, "num_heads: 6 there, 3 here"),
        ({"context_dropout": 0.0}, "without dropping its condition"),
        ({"scale_factor": 0.13025}, "scale 0.13025, shift 0.0; here they have"),
    ]:
        torch.save(content | {"args": content["args"] | said}, path)
        refused(path, match)
    assert not (tmp_path / "run").exists()


def test_prompts_need_the_datas_own_text_encoder(runs: Path, tmp_path: Path) -> None:
    save_text_encoder(tmp_path / "other", seed=5)
    given = ["--checkpoint", str(runs / "stage1"), f"--out={tmp_path / 's'}", "--steps=1", "--device=cpu"]
    given += ["--prompts", "a red ring"]
    with pytest.raises(Mistake, match="is not the text encoder of"):
        sample_prompts.main([*given, f"--text-encoder={tmp_path / 'other'}"])
    assert sample_prompts.main(given).exists()


def test_a_checkpoint_is_read_with_the_sizes_that_it_records(runs: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint(runs / "stage2", 4))
    model, found = mmdit_from_checkpoint(checkpoint(runs / "stage2", 4), weights="model")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in content["model"].items())
    assert (model.training, found.steps, found.settings["context_size"]) == (False, 4, TEXT_WIDTH)
    for changes, match in [
        ({"hidden_size": 48}, "it describes a MMDiT of"),
        ({"patch_size": 1}, r"pos_embed: saved \(1, 16, 24\), model \(1, 64, 24\)"),
        ({"depth": 10**9}, "depth=1000000000.*6 joint blocks among its weights"),
        ({"context_size": None}, "num_heads: None|context_size: None"),
    ]:
        torch.save(content | {"args": content["args"] | changes}, tmp_path / "changed.pt")
        with pytest.raises(ValueError, match=match):
            mmdit_from_checkpoint(tmp_path / "changed.pt")
