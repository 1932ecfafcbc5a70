"""The wide head of DiT^DH against its definition, token by token; what of it runs and trains."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from erw.config import Model, Run, from_dict, to_dict
from erw.errors import ConfigError
from erw.models import SiT, build_model
from erw.models.sit import rope_2d, rotate
from erw.recipes import recipe
from helpers.reference import relative

SIZE = dict(input_size=4, channels=12, patch=1, width=16, depth=2, heads=2, num_classes=5)
HEAD = dict(head_depth=2, head_width=24, head_heads=3)
LIGHTNING = dict(rope=True, norm="rms", mlp="swiglu")


def made(**options) -> SiT:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = SiT(**SIZE, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.tensor([0.2, 0.9], dtype=torch.float64), torch.tensor([3, 5])


def by_token(w: dict[str, Tensor], x: Tensor, h: Tensor, time: Tensor, *, rope: bool) -> Tensor:
    """The head's output (T, C) of one image, tokens one by one: RAE's `DiTwDDTHead` by its text.

    x (C, H, W), h (T, D) what the blocks give, time (D,); `rope`: and root-mean-square norms and
    SwiGLU, else LayerNorm and GELU.
    """

    def linear(name: str, v: Tensor) -> Tensor:
        return w[f"{name}.weight"].flatten(1) @ v + w[f"{name}.bias"]

    def norm(name: str, v: Tensor) -> Tensor:
        if rope:
            return v / (v.square().mean() + 1e-6).sqrt() * w[f"{name}.weight"]
        return (v - v.mean()) / (v.var(correction=0) + 1e-6).sqrt()

    def silu(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v))

    tokens, heads, size = len(h), 3, 8
    condition = [silu(linear("head_projector", silu(time + h[i]))) for i in range(tokens)]
    state = [linear("head_embedder.proj", x[:, i // 4, i % 4]) for i in range(tokens)]
    tables = rope_2d(size, 4).double()
    for block in ("blocks.2", "blocks.3"):
        modulation = [linear(f"{block}.adaLN_modulation.1", c).chunk(6) for c in condition]
        qkv = []
        for i, (shift, scale, *_) in enumerate(modulation):
            v = norm(f"{block}.norm1", state[i]) * (1 + scale) + shift
            q, k, v = linear(f"{block}.attn.qkv", v).reshape(3, heads, size)
            if rope:
                q, k = (rotate(z[None, :, None], *tables[:, i : i + 1])[0, :, 0] for z in (q, k))
            qkv.append((q, k, v))
        for i, (_, _, gate, shift, scale, gate2) in enumerate(modulation):
            attended = []
            for head in range(heads):
                logits = torch.stack([qkv[i][0][head] @ k[head] for _, k, _ in qkv])
                weights = torch.softmax(logits / math.sqrt(size), 0)
                attended.append(sum(p * v[head] for p, (_, _, v) in zip(weights, qkv, strict=True)))
            state[i] = state[i] + gate * linear(f"{block}.attn.proj", torch.cat(attended))
            v = norm(f"{block}.norm2", state[i]) * (1 + scale) + shift
            if rope:
                a, b = linear(f"{block}.mlp.w12", v).chunk(2)
                v = linear(f"{block}.mlp.w3", silu(a) * b)
            else:
                v = F.gelu(linear(f"{block}.mlp.fc1", v), approximate="tanh")
                v = linear(f"{block}.mlp.fc2", v)
            state[i] = state[i] + gate2 * v
    out = []
    for v, c in zip(state, condition, strict=True):
        shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2)
        v = norm("final_layer.norm_final", v) * (1 + scale) + shift
        out.append(linear("final_layer.linear", v))
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, LIGHTNING])
@torch.no_grad()
def test_the_head_is_that_of_its_definition(options: dict[str, object]) -> None:
    model, (x, t, y) = made(**HEAD, **options), batch()
    tapped = model(x, t, y, tap=(2,))
    assert torch.equal(tapped.velocity, model(x, t, y))
    weights = dict(model.state_dict())
    for i in range(2):
        time = model.t_embedder(t)[i]
        want = by_token(weights, x[i], tapped.hidden[2][i], time, rope=bool(options))
        assert want.std() > 0.1
        # Root-mean-square norms, queries and keys are float32 in the network.
        limit = 1e-5 if options else 1e-12
        assert relative(tapped.velocity[i], want.T.reshape(12, 4, 4)) < limit


def test_the_blocks_below_are_those_of_a_network_without_a_head() -> None:
    """Names and tokens are the same; a stop does not run the head; a warm-up trains none of it."""
    x, t, y = batch()
    new = SiT(**SIZE, **HEAD).double()
    assert not new(x, t, y).any()  # adaLN-Zero: a new model predicts nothing
    plain, model = made(), made(**HEAD)
    theirs = dict(model.named_parameters())
    assert theirs.keys() > dict(plain.named_parameters()).keys()
    shared = {k: p for k, p in plain.state_dict().items() if "final_layer" not in k}
    model.load_state_dict(shared, strict=False)
    ran: list[object] = []
    for module in (model.head_embedder, *model.blocks[2:]):
        module.register_forward_hook(lambda *_: ran.append(1))
    stopped = model(x, t, y, tap=(1,), stop_at=1)
    assert not ran and torch.equal(stopped.hidden[1], plain(x, t, y, tap=(1,)).hidden[1])
    trained = {id(p) for module in model.warmup_modules(1) for p in module.parameters()}
    frozen = {k for k, p in theirs.items() if id(p) not in trained}
    later = ("blocks.1.", "blocks.2.", "blocks.3.", "head_", "final_layer.")
    assert frozen == {k for k in theirs if k.startswith(later)}


def test_a_token_reads_what_its_own_place_became() -> None:
    """Through the modulation a gradient of one place's output reaches the blocks below."""
    model, (x, t, y) = made(**HEAD), batch()
    for block in model.blocks[2:]:
        torch.nn.init.zeros_(block.attn.proj.weight)  # no attention between the head's tokens
    tapped = model(x, t, y, tap=(2,))
    tapped.hidden[2].retain_grad()
    tapped.velocity[0, :, 1, 2].sum().backward()
    reached = tapped.hidden[2].grad.abs().sum(2) > 0
    assert reached.nonzero().tolist() == [[0, 1 * 4 + 2]]
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_its_size_is_the_published_one() -> None:
    """DiT^DH-XL: 839 M. Theirs counts positions and the frequencies of times, and has 512 of these
    where we have 256."""
    run = recipe("sit_xl1_in256_rae")
    with torch.device("meta"):
        net = build_model(dataclasses.replace(run.model, num_classes=1000))
    count = sum(p.numel() for p in net.parameters())
    assert round((count + 256 * 1152 + 256 * 1152 + 256) / 1e6) == 839
    assert run.flow.shift == run.sample.shift == pytest.approx(math.sqrt(768 * 16 * 16 / 4096))


def test_its_flops_are_those_of_its_matrices() -> None:
    def flops(**options: int) -> int:
        with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            net, x = SiT(**SIZE, **options), torch.zeros(1, 12, 4, 4)
            with FlopCounterMode(display=False) as counter:
                net(x, torch.zeros(1))
        return counter.get_total_flops()

    tokens, width, wide, channels = 16, 16, 24, 12
    block = wide * wide * (3 + 1 + 8 + 6) + 2 * tokens * wide  # a token of a block
    head = channels * wide + width * wide + 2 * block + 2 * wide * wide + wide * channels
    final = tokens * width * channels + 2 * width * width  # the other's: one modulation for all
    assert flops(**HEAD) - flops() == 2 * (tokens * head - final)


def test_settings_of_a_head() -> None:
    for values, words in (
        ({"head_depth": 2, "head_width": 100, "head_heads": 3}, "head_width 100 is no multiple of"),
        ({"head_depth": 1, "head_width": 6, "head_heads": 1}, "head_width 6 is no multiple of 4"),
        ({"head_depth": 1, "class_token": "denoised"}, "head_depth is for images without a class"),
    ):
        with pytest.raises(ConfigError, match=words):
            from_dict(Run, {"model": values})
    old = to_dict(Run())
    old["model"] = {k: v for k, v in old["model"].items() if not k.startswith("head_")}
    assert from_dict(Run, old).model == Model()  # a recipe.json from before there was a head
