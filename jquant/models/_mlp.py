"""The table of an MLP's matrices, which most kinds of blocks end with: see `Block` for what it computes."""

from __future__ import annotations

from collections.abc import Mapping

from jquant.models._kinds import MLP_IN, MLP_OUT, Coupling, Form, Matrix, Role, coupling

_PAIR = "ffn_gate and ffn_up"


def _rows(suffix: str, form: Form, role: Role) -> tuple[Matrix, ...]:
    gate, up = (
        Matrix(
            name=f"ffn_{name}{suffix}",
            stage=MLP_IN,
            role=role,
            form=form,
            over_model="rows",
            sensitivity=3.0,
            searched_with=_PAIR,
        )
        for name in ("gate", "up")
    )
    down = Matrix(
        name=f"ffn_down{suffix}", stage=MLP_OUT, role=role, form=form, over_model="columns", sensitivity=2.4
    )
    return gate, up, down


def _router(name: str) -> Matrix:
    return Matrix(name=name, stage=MLP_IN, role="mlp", form="router")


MLP = (
    *_rows("", "linear", "mlp"),
    *_rows("_exps", "stack", "expert"),
    *_rows("_shexp", "linear", "mlp"),
    _router("ffn_gate_inp"),
    _router("ffn_gate_inp_shexp"),
)
MLP_NORMS = ("ffn_norm", "post_ffw_norm")


def mlp_couplings(shapes: Mapping[str, tuple[int, ...]]) -> list[Coupling]:
    """norm → gate, up, experts, router; up → down, which takes act(gate) · up, linear in up."""
    routed = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps")
    shared = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp_shexp")
    # Without a gate of its own, `up` holds both, the gate first.
    start = 0 if "ffn_gate" in shapes else shapes.get("ffn_down", (0, 0))[-1]
    experts = shapes["ffn_up_exps"][0] if "ffn_up_exps" in shapes else None
    return [
        *coupling(shapes, "ffn_norm", "ffn_norm", ("ffn_gate", "ffn_up", *routed, *shared)),
        *coupling(shapes, "ffn_up", "ffn_up", ("ffn_down",), start=start),
        *coupling(shapes, "ffn_up_exps", "ffn_up_exps", ("ffn_down_exps",), experts=experts),
        *coupling(shapes, "ffn_up_shexp", "ffn_up_shexp", ("ffn_down_shexp",)),
    ]
