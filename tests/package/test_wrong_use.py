"""The mistakes that are easiest to make with each backbone: every one ends in an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from backbones import PATHS, Backbone
from lookalikes import LOOKALIKES
from small_diffusers import EMPTY_TEXT, SMALL_DIFFUSERS
from torch import nn
from toys import ToyDiT

import selftrans_reg as st
from selftrans_reg import errors

SIT, REPA, MMDIT, UVIT, MDT = (LOOKALIKES[name] for name in ("SiT", "REPA", "MMDiT", "U-ViT", "MDT"))
MASKDIT, EDM2, PIXART = (LOOKALIKES[name] for name in ("MaskDiT", "EDM2", "PixArt"))
SD3, FLUX, COGVIDEOX, LUMINA2 = (SMALL_DIFFUSERS[name] for name in ("SD3", "Flux", "CogVideoX", "Lumina2"))


def refused(error: type[Exception], *parts: str) -> Any:
    """The block raises ``error``, and its message holds all ``parts`` in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(parts))


def step1(backbone: Backbone, changes: dict[str, Any] | None = None, **settings: Any) -> st.LossTerms:
    """A step of stage 1, with some arguments of the model's call changed."""
    return _step(backbone, lambda model: backbone.stage1(model, **settings), changes)


def step2(
    backbone: Backbone, changes: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None, **settings: Any
) -> st.LossTerms:
    """The same of stage 2; ``teacher`` holds the teacher's settings."""
    made = backbone.make_teacher(backbone.build(1), **teacher or {})
    return _step(backbone, lambda model: backbone.stage2(model, made, **settings), changes)


def _step(
    backbone: Backbone, attach: Callable[[nn.Module], st.SelfTransLoss], changes: dict[str, Any] | None
) -> st.LossTerms:
    model, batch = backbone.build(0), backbone.batch(16)
    criterion = attach(model)
    batch.arguments.update(changes or {})
    return criterion(backbone.losses(model, batch).mean(), latents=batch.latents)


class TestTime:
    """Of a noise level (EDM2, MaskDiT) there is no direction to mistake."""

    @pytest.mark.parametrize("name", [n for n, b in LOOKALIKES.items() if b.t != "sigma"])
    def test_reversed_on_a_look_alike(self, name: str) -> None:
        self.reverse(LOOKALIKES[name])

    @pytest.mark.parametrize("name", SMALL_DIFFUSERS)
    def test_reversed_on_a_model_of_diffusers(self, name: str) -> None:
        self.reverse(SMALL_DIFFUSERS[name])

    @staticmethod
    def reverse(backbone: Backbone) -> None:
        """The loop gives the model the times that the convention would call the opposite."""
        low, high = PATHS[backbone.time][:2]
        reversed_t = low + high - backbone.batch(16).arguments[backbone.t]
        with refused(errors.TimeConventionError, f"time='{backbone.time}' contradicts", "slope of x_t"):
            step1(backbone, {backbone.t: reversed_t})

    @pytest.mark.parametrize(("backbone", "wrong"), [(SIT, "repa"), (REPA, "sit")], ids=["SiT", "REPA"])
    @pytest.mark.parametrize("step", [step1, step2])
    def test_the_convention_of_the_other_family(self, step: Callable[..., Any], backbone: Backbone, wrong: str) -> None:
        with refused(errors.TimeConventionError, f"time='{wrong}' contradicts", f"fit: .*'{backbone.time}'"):
            step(backbone, time=wrong)

    @pytest.mark.parametrize("wrong", ["repa", "sit", "flow-unit"])
    @pytest.mark.parametrize("name", ["DiT", "MDT", "PixArt"])
    def test_steps_where_fractions_are_expected(self, name: str, wrong: str) -> None:
        message = ("values from 0 to 1 are expected", "look like steps", "These conventions fit: .*'ddpm'")
        with refused(errors.TimeConventionError, f"does not fit time='{wrong}'", *message):
            step1(LOOKALIKES[name], time=wrong)

    @pytest.mark.parametrize(("wrong", "expected"), [("ddpm", "whole steps"), ("flow", "values from 0 to 1000")])
    @pytest.mark.parametrize("name", ["SiT", "REPA", "LightningDiT"])
    def test_fractions_where_steps_are_expected(self, name: str, wrong: str, expected: str) -> None:
        message = (expected, "look like fractions", "These conventions fit: 'repa'")
        with refused(errors.TimeConventionError, f"does not fit time='{wrong}'", *message):
            step1(LOOKALIKES[name], time=wrong)

    def test_the_logarithm_of_sigma_where_sigma_is_expected(self) -> None:
        sigma = EDM2.batch(16).arguments["sigma"]
        with refused(errors.TimeConventionError, "does not fit time='edm'", "neither fractions nor steps"):
            step1(EDM2, {"sigma": sigma.log() / 4})

    def test_a_teacher_of_another_convention(self) -> None:
        with refused(errors.TimeConventionError, "built for the time convention 'repa'", "'sit'", "must agree"):
            step2(SIT, teacher={"time": "repa"})


class TestStreams:
    @pytest.mark.parametrize("backbone", [MMDIT, SD3], ids=["MMDiT", "SD3"])
    def test_several_tensors_and_no_select(self, backbone: Backbone) -> None:
        length, width = (5, 16) if backbone is MMDIT else (7, 32)
        listing = rf"\[0\]: \(16, {length}, {width}\)\n  \[1\]: \(16, 16, {width}\)"
        with refused(errors.CallError, "returns a tuple with 2 tensors", listing, "select="):
            step1(backbone, select=None)

    @pytest.mark.parametrize("backbone", [MMDIT, SD3, COGVIDEOX], ids=["MMDiT", "SD3", "CogVideoX"])
    def test_the_text_for_the_image_in_stage_1(self, backbone: Backbone) -> None:
        text = 1 - backbone.reads["select"]
        with refused(errors.ShapeError, "tokens do not fit the latent grid", "the text's", "select="):
            step1(backbone, select=text)

    @pytest.mark.parametrize("backbone", [MMDIT, SD3, COGVIDEOX], ids=["MMDiT", "SD3", "CogVideoX"])
    @pytest.mark.parametrize("teacher_too", [True, False])
    def test_the_text_for_the_image_in_stage_2(self, backbone: Backbone, teacher_too: bool) -> None:
        text = 1 - backbone.reads["select"]
        with refused(errors.ShapeError, "tokens, which cannot be the patches of x_t", "the text's", "select="):
            step2(backbone, select=text, teacher={"select": text} if teacher_too else None)

    @pytest.mark.parametrize("backbone", [MMDIT, SD3, COGVIDEOX], ids=["MMDiT", "SD3", "CogVideoX"])
    def test_the_text_of_the_teacher_alone(self, backbone: Backbone) -> None:
        text = 1 - backbone.reads["select"]
        with refused(errors.ShapeError, "teacher gives features", "student's head", "image's tokens"):
            step2(backbone, teacher={"select": text})


class TestTokens:
    def test_class_and_time_tokens_counted_as_patches_in_stage_1(self) -> None:
        message = ("18 tokens do not fit the latent grid 4×4, which has 16", r"slice\(2, None\)", r"slice\(None, 16\)")
        with refused(errors.ShapeError, *message, r"slice\(k, k \+ 16\)"):
            step1(UVIT, tokens=None)

    def test_class_and_time_tokens_counted_as_patches_in_stage_2(self) -> None:
        with refused(errors.ShapeError, "18 tokens, which cannot be the patches of x_t", r"tokens=slice\(None\)"):
            step2(UVIT, tokens=None, teacher={"tokens": None})

    def test_class_and_time_tokens_counted_as_patches_by_the_teacher(self) -> None:
        with refused(errors.ShapeError, r"teacher gives features \(\d, 18, 16\)", r"head \(\d, 16, 16\)", "tokens="):
            step2(UVIT, teacher={"tokens": None})

    def test_all_tokens_may_be_aligned_on_purpose(self) -> None:
        everything = slice(None)
        assert step2(UVIT, tokens=everything, teacher={"tokens": everything}).alignment > 0

    def test_captions_of_different_lengths_before_the_image(self) -> None:
        message = ("23 tokens do not fit the latent grid 4×4", "differs by sample", "callable", "call's arguments")
        with refused(errors.ShapeError, *message):
            step1(LUMINA2, tokens=None)

    def test_a_masked_encoder(self) -> None:
        """MDT's second forward sees half of the tokens, MaskDiT's encoder too."""
        with refused(errors.ShapeError, "8 tokens do not fit the latent grid 4×4", "masked encoder"):
            step1(MDT, forward="last")
        with refused(errors.ShapeError, "9 tokens do not fit the latent grid 4×4", "masked encoder"):
            step1(MASKDIT, layer="model.blocks.1")

    def test_a_teacher_of_another_patch_size(self) -> None:
        small = replace(SIT, build=lambda seed: ToyDiT(seed=seed, patch_size=4 if seed == 1 else 2).train())
        with refused(errors.ShapeError, r"teacher gives features \(\d, 4, 16\)", "patch size"):
            step2(small)


class TestLatents:
    def test_unpacked_where_x_t_is_packed(self) -> None:
        model, batch = FLUX.build(0), FLUX.batch()
        criterion = FLUX.stage1(model)
        unpacked = batch.latents.unflatten(1, (4, 4)).unflatten(3, (4, 2, 2))  # (N, h, w, C, p, q)
        with refused(errors.ShapeError, r"\(8, 4, 8, 8\)", r"\(8, 16, 16\) differ in shape", "packed", "channel_axis"):
            criterion(FLUX.losses(model, batch).mean(), latents=unpacked.permute(0, 3, 1, 4, 2, 5).reshape(8, 4, 8, 8))

    def test_packed_without_saying_where_the_channels_are(self) -> None:
        with refused(errors.SettingError, "channel_axis=3 is no axis of latents with 1 spatial axes"):
            step1(FLUX, channel_axis=3)
        with refused(errors.ShapeError, "do not have, on axis 1, the 4 channels", "channel_axis"):
            step1(COGVIDEOX, channel_axis=1, latent_channels=4)

    def test_of_another_scale(self) -> None:
        """The VAE's latents before the factor that makes their variance 1."""
        model, batch = SIT.build(0), SIT.batch(16)
        criterion = SIT.stage1(model)
        with refused(
            errors.TimeConventionError, "0.18 times as much", "as the model sees", "noise offset.*check_interval=None"
        ):
            criterion(SIT.losses(model, batch).mean(), latents=batch.latents / 0.18)

    def test_of_a_batch_that_the_loop_doubled(self) -> None:
        model, batch = SIT.build(0), SIT.batch(16)
        criterion = SIT.stage1(model)
        loss = SIT.call(model, {name: torch.cat([a, a]) for name, a in batch.arguments.items()}).square().mean()
        with refused(errors.ShapeError, "There are 16 latents, but the model's last call had 32 samples"):
            criterion(loss, latents=batch.latents)


class TestNullCondition:
    def test_a_model_without_a_null_row(self) -> None:
        backbone = replace(SIT, build=lambda seed: ToyDiT(dropout=0.0, seed=seed).train())
        message = ("Index 10 would reach embedding 'y_embedder', which has 10 rows", "without label dropout")
        with refused(errors.SettingError, *message, "no null row"):
            step2(backbone)

    def test_empty_prompt_with_its_batch_axis(self) -> None:
        null = {"encoder_hidden_states": EMPTY_TEXT[None], "pooled_projections": torch.zeros(20)}
        with refused(errors.SettingError, r"has shape \(1, 7, 24\)", r"should be \(7, 24\)"):
            step2(SD3, teacher={"null": null})

    def test_a_callable_that_returns_one_row(self) -> None:
        with refused(errors.SettingError, r"callable null condition for 'y' returned \(1,\)", r"\(16,\)"):
            step2(SIT, teacher={"null": {"y": lambda call: torch.tensor([10])}})


class TestRows:
    def test_places_that_look_packed(self) -> None:
        """As many image tokens as twice the batch."""
        model, batch = FLUX.build(0), FLUX.batch(8)
        call = {"t": "timestep"}
        criterion = FLUX.stage2(model, FLUX.make_teacher(FLUX.build(1), call=call), call=call)
        with refused(errors.CallError, r"'img_ids' has shape \(16, 3\)", r"shared=\['img_ids'\]"):
            criterion(FLUX.losses(model, batch).mean())

    def test_places_that_look_like_rows(self) -> None:
        """As many image tokens as samples: the model fails, and the error says what was doubled."""
        with pytest.raises(RuntimeError) as caught:
            step2(FLUX, teacher={"call": {"t": "timestep"}}, call={"t": "timestep"})
        assert "'img_ids'" in str(caught.value)
        assert "call=dict(shared=[...])" in str(caught.value)

    @pytest.mark.parametrize("named_by", ["teacher", "criterion"])
    def test_either_side_may_say_what_is_shared(self, named_by: str) -> None:
        calls = {"teacher": {"t": "timestep"}, "criterion": {"t": "timestep"}}
        calls[named_by]["shared"] = ["img_ids", "txt_ids"]
        terms = step2(FLUX, teacher={"call": calls["teacher"]}, call=calls["criterion"])
        assert terms.alignment > 0

    @pytest.mark.parametrize(
        ("fixed", "message"), [({"ratio": 0.0}, "names 'ratio'.*Nearest: 'mask_ratio'"), ({"sigma": 1.0}, "x_t or t")]
    )
    def test_a_fixed_argument_that_cannot_be(self, fixed: dict[str, Any], message: str) -> None:
        with refused(errors.SettingError, message):
            step2(MASKDIT, teacher={"call": {"fixed": fixed}})


class TestForwards:
    @pytest.mark.parametrize("step", [step1, step2])
    def test_two_forwards_and_no_choice(self, step: Callable[..., Any]) -> None:
        with refused(errors.CaptureError, "ran 2 forwards", "forward='first' or 'last'"):
            step(MDT, forward=None)


class TestLayers:
    def test_a_layer_that_one_forward_in_two_runs(self) -> None:
        with refused(errors.CaptureError, "Layer 'sideblocks.0' did not run", "skips this layer"):
            step1(MDT, layer="sideblocks.0")

    def test_a_width_that_cannot_be_told(self) -> None:
        with refused(errors.SettingError, r"'unet\.enc\.16x16_block1' \(ConvBlock\)", "Pass hidden_size="):
            step1(EDM2, hidden_size=None)

    def test_a_layer_by_its_number(self) -> None:
        with refused(errors.SettingError, "dotted module name", "encoder_depth=8", "'blocks.7'"):
            step1(SIT, layer=8)
