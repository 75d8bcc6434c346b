"""A kind of block that the library does not have, added here in a few lines: all that calibrates, codes, lays
out and plans takes it up. No line of the library names its matrices."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import ArraySource

from jquant import FORMATS, models
from jquant.allocation._search import groups
from jquant.allocation.prior import usual_weights
from jquant.calibration import HESSIAN, SECOND_MOMENTS, collect, sharded
from jquant.checkpoints.weights import Weights
from jquant.core import UserError
from jquant.distributed.mesh import make_mesh
from jquant.ldlq.sequential import feed_back
from jquant.models import _kinds
from jquant.models._layers import Block
from jquant.models._mlp import MLP, MLP_NORMS, mlp_couplings
from jquant.models._rope import Rotary
from jquant.plan.selection import roles
from jquant.smoothquant import _smooth as smooth
from jquant.writers.folder_plan import _is_quantized

WIDTH, HIDDEN, VOCAB, KERNEL = 32, 64, 48, 3
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 16))


class Kernel(nn.Module):
    """A weight that is not multiplied by as a matrix is."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("weight", nn.initializers.ones, self.shape)


class ShortConvolution(Block, kw_only=True):
    """h = x + out(c · conv(b · u)), (b, c, u) = in(rmsnorm(x)); then an MLP: LFM2's gated convolution."""

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        b, c, u = jnp.split(self._linear("conv_in")(self._factor(self._norm("conv_norm", x))), 3, axis=-1)
        kernel = Kernel((WIDTH, KERNEL), name="conv_kernel")()
        past = jnp.pad(b * u, ((0, 0), (KERNEL - 1, 0), (0, 0)))
        t = x.shape[1]
        mixed = sum(past[:, k : k + t] * kernel[:, k][None, None] for k in range(KERNEL))
        return self._fed_forward(x + self._linear("conv_out")(self._factor(c * mixed)))


def couplings(block):
    shapes = {name.removesuffix(".weight"): shape for name, shape in block.shapes}
    norm = _kinds.coupling(shapes, "conv_norm", "conv_norm", ("conv_in",), before_mixing=True)
    return (*norm, *mlp_couplings(shapes))


def build(header, traits, i, count, shapes):
    eps = header.number("attention.layer_norm_rms_epsilon")
    return ShortConvolution(shapes=shapes, eps=eps), Rotary(dims=2, base=10000.0)


def row(name, stage, **more):
    return models.Matrix(name=name, stage=stage, role="attention", **more)


KIND = models.Kind(
    "short convolution",
    matrices=(
        row("conv_in", _kinds.MIXER_IN, over_model="rows", sensitivity=7.0, searched_with="convolutions"),
        row("conv_kernel", _kinds.MIXER_IN + 5, form="other"),
        row("conv_out", _kinds.MIXER_OUT, over_model="columns"),
        *MLP,
    ),
    norms=("conv_norm", *MLP_NORMS),
    block=build,
    couplings=couplings,
)


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(models.KINDS, KIND.name, KIND)


def tiny():
    """Two blocks: a convolution, then attention."""
    rng = np.random.default_rng(1)
    mlp = {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    convolution = {
        "conv_in": (3 * WIDTH, WIDTH), "conv_kernel": (WIDTH, KERNEL), "conv_out": (WIDTH, WIDTH)
    }  # fmt: skip
    square = (WIDTH, WIDTH)
    attention = {"attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square}
    shapes = {f"blk.0.{n}": shape for n, shape in {**convolution, **mlp}.items()}
    shapes |= {f"blk.1.{n}": shape for n, shape in {**attention, **mlp}.items()}
    shapes |= {"token_embd": (VOCAB, WIDTH)}
    norms = ("blk.0.conv_norm", "blk.0.ffn_norm", "blk.1.attn_norm", "blk.1.ffn_norm", "output_norm")
    tensors = {f"{n}.weight": rng.standard_normal(shape) * shape[-1] ** -0.5 for n, shape in shapes.items()}
    tensors |= {f"{n}.weight": np.ones(WIDTH) for n in norms}
    return ArraySource({name: tensor.astype(np.float32) for name, tensor in tensors.items()})


HEADER = {
    "general.architecture": "llama",
    "llama.block_count": np.uint32(2),
    "llama.embedding_length": np.uint32(WIDTH),
    "llama.attention.head_count": np.uint32(2),
    "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
}


def opened():
    return models.decoder(Weights(tiny()), HEADER)


CONVOLUTION = ["blk.0.conv_in.weight", "blk.0.conv_out.weight"]


def test_without_the_kind_its_tensors_are_refused():
    with pytest.raises(UserError, match=r"blk\.0\.conv_in\.weight: what the model does"):
        opened()


def test_a_matrix_of_one_name_is_the_same_in_every_kind(added):
    for kind in models.KINDS.values():
        assert [models.matrix(row.name) for row in kind.matrices] == list(kind.matrices)


def test_statistics_are_of_the_kinds_matrices(added):
    decoder = opened()
    moments = collect(decoder, TOKENS, SECOND_MOMENTS)
    hessians = collect(decoder, TOKENS, HESSIAN)
    assert set(CONVOLUTION) < moments.keys() == hessians.keys()
    assert "blk.0.conv_kernel.weight" not in moments
    for name in CONVOLUTION:
        diagonal = np.diagonal(np.asarray(hessians[name]["xtx"]))
        assert diagonal.min() > 0
    assert list(models.matrices(decoder.load_block(0))) == [
        "conv_in",
        "conv_out",
        "ffn_down",
        "ffn_gate",
        "ffn_up",
    ]


def test_two_devices_measure_what_one_does(added):
    assert sharded.partition("conv_in.weight", (96, 32), 2) == jax.sharding.PartitionSpec("model")
    assert sharded.partition("conv_out.weight", (32, 32), 2) == jax.sharding.PartitionSpec(None, "model")
    decoder = opened()
    alone = collect(decoder, TOKENS, HESSIAN)
    both = collect(decoder, TOKENS, HESSIAN, through=sharded.over(make_mesh({"model": 2})))
    for name in CONVOLUTION:
        np.testing.assert_allclose(both[name]["xtx"], alone[name]["xtx"], rtol=0, atol=1e-3)


def test_its_matrices_are_fed_back_in_the_order_of_its_stages(added):
    assert models.stages(["ffn_up", "conv_out", "conv_in"]) == [["conv_in"], ["conv_out"], ["ffn_up"]]
    formats = dict.fromkeys([*CONVOLUTION, "blk.0.ffn_down.weight"], FORMATS["Q4_0"])
    blocks = list(feed_back(opened(), TOKENS, formats))
    assert set(blocks[0]) == set(formats)
    assert all(0 < fed.error < 0.05 for fed in blocks[0].values())


def test_channels_move_where_it_says_and_the_function_stays(added):
    decoder = opened()
    block, params = decoder.blocks[0], decoder.load_block(0)
    assert [c.name for c in smooth.couplings(block)] == ["conv_norm", "ffn_norm", "ffn_up"]
    scales = {"conv_norm": jnp.linspace(0.5, 2.0, WIDTH)}
    x, angles = jnp.asarray(decoder.embed(TOKENS)), jnp.asarray(decoder.angles(0, TOKENS.shape[1]))
    before = models.run_block(block, params, x, angles)
    after = models.run_block(block, smooth.smoothed(block, params, scales), x, angles)
    np.testing.assert_allclose(before, after, atol=1e-4)


def test_plans_know_it(added):
    weights = usual_weights([*CONVOLUTION, "output.weight"], layers=2)
    assert weights["blk.0.conv_in.weight"] == 7.0 / 2
    assert roles("blk.0.conv_in.weight", is_tied=False) == {"attention"}
    assert groups(dict.fromkeys(CONVOLUTION), 2)["convolutions"] == ["blk.0.conv_in.weight"]
    assert _is_quantized("blk.0.conv_in.weight")
    assert not _is_quantized("blk.0.conv_kernel.weight")
