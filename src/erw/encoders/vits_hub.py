"""Vision transformers by name: the family that reads them, and where their weights are."""

from erw.encoders.pretrained import Hub

HUB: dict[str, tuple[str, Hub]] = {
    "dinov2-s": (
        "dinov2",
        Hub("facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056"),
    ),
    "dinov2-b": (
        "dinov2",
        Hub("facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415"),
    ),
    "dinov2-l": (
        "dinov2",
        Hub("facebook/dinov2-large", "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c"),
    ),
    "dinov2-g": (
        "dinov2",
        Hub("facebook/dinov2-giant", "611a9d42f2335e0f921f1e313ad3c1b7178d206d"),
    ),
    "dinov2-s-reg": (
        "dinov2-reg",
        Hub("facebook/dinov2-with-registers-small", "0d9846e56b43a21fa46d7f3f5070f0506a5795a9"),
    ),
    "dinov2-b-reg": (
        "dinov2-reg",
        Hub("facebook/dinov2-with-registers-base", "a1d738ccfa7ae170945f210395d99dde8adb1805"),
    ),
    "dinov2-l-reg": (
        "dinov2-reg",
        Hub("facebook/dinov2-with-registers-large", "e4c89a4e05589de9b3e188688a303d0f3c04d0f3"),
    ),
    "dinov2-g-reg": (
        "dinov2-reg",
        Hub("facebook/dinov2-with-registers-giant", "8d0d49f77fb8b5dd78842496ff14afe7dd4d85cb"),
    ),
    "dino-b": ("dino", Hub("facebook/dino-vitb16", "f205d5d8e640a89a2b8ef0369670dfc37cc07fc2")),
    "dinov3-s": (
        "dinov3",
        Hub("facebook/dinov3-vits16-pretrain-lvd1689m", "114c1379950215c8b35dfcd4e90a5c251dde0d32"),
    ),
    "dinov3-b": (
        "dinov3",
        Hub("facebook/dinov3-vitb16-pretrain-lvd1689m", "3a0fa61ff39414e2d3be4a1d50c7dfbf459aa8b8"),
    ),
    "dinov3-l": (
        "dinov3",
        Hub("facebook/dinov3-vitl16-pretrain-lvd1689m", "ea8dc2863c51be0a264bab82070e3e8836b02d51"),
    ),
    "clip-l": (
        "clip",
        Hub("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"),
    ),
    "clip-l-336": (
        "clip-embedding",
        Hub("openai/clip-vit-large-patch14-336", "ce19dc912ca5cd21c8a653c79e251e808ccabcd1"),
    ),
    "siglip2-b": (
        "siglip2",
        Hub("google/siglip2-base-patch16-256", "3f9f96cb90da5dbc758b01813f2f6f1aee24c1ab"),
    ),
    "siglip2-l": (
        "siglip2",
        Hub("google/siglip2-large-patch16-256", "787800c8990e6f058423089178e718139608408c"),
    ),
    "siglip2-so400m": (
        "siglip2",
        Hub("google/siglip2-so400m-patch16-256", "e8708ab72d125807e45b36fb7d4e0aacbb59f379"),
    ),
    "mae-l": (
        "mae",
        Hub("facebook/vit-mae-large", "142cb8c25e1b1bc1769997a919aa1b5a2345a6b8"),
    ),
    "ijepa-h": (
        "ijepa",
        Hub("facebook/ijepa_vith14_1k", "f157467ea509bc356ff9f61fd3c0d840eec5e04e"),
    ),
}
"""name -> (family of `vits.FAMILIES`, weights on the hub at a pinned revision)"""
