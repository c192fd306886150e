"""The text-to-image demo's data: captioned shapes through a small VAE, their captions through a small text encoder."""

from pathlib import Path

from common.captioned_shapes import captioned_shapes, save_text_encoder
from common.coco_features import write_coco_features
from common.run_folder import open_run_folder
from common.scaling import scaling_of
from common.text import load_text_encoder
from common.vae import encode_moments, trained_vae

VAE = "vae"
TEXT_ENCODER = "text_encoder"
_SPLIT = "train"


def make_demo(folder: Path, *, images: int, vae_steps: int, seed: int = 0) -> None:
    """Make the folder's VAE, text encoder and features in U-ViT's layout; what is finished is not made again.

    Raises:
        SettingError: If the folder holds a demo of other settings, or something else.
    """
    open_run_folder(folder, {"images": images, "vae_steps": vae_steps, "seed": seed})
    if (folder / _SPLIT).exists():
        return
    data = captioned_shapes(images, seed=seed)
    vae = trained_vae(folder / VAE, data.images, steps=vae_steps, seed=seed, device="cpu")
    if not (folder / TEXT_ENCODER).exists():
        save_text_encoder(folder / TEXT_ENCODER, seed=seed)
    encoder = load_text_encoder(str(folder / TEXT_ENCODER))
    mean, std = encode_moments(vae, data.images)
    texts = ["", *(caption for captions in data.captions for caption in captions)]
    empty, *features = encoder.encode(texts).features.split([1, *map(len, data.captions)])
    items = zip(mean, std, features, strict=True)
    write_coco_features(
        folder, _SPLIT, items, empty[0], scaling=scaling_of(vae.config, "The VAE"), vae=str(folder / VAE)
    )
