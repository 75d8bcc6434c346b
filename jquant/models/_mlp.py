"""The table of an MLP's matrices, which most kinds of blocks end with: see `Block` for what it computes."""

from __future__ import annotations

from collections.abc import Mapping

from jquant.models._kinds import MLP_IN, MLP_OUT, Coupling, Matrix, coupling

_PAIR = "ffn_gate and ffn_up"
MLP = (
    *(
        Matrix(
            name=name + suffix,
            stage=stage,
            role="expert" if form == "stack" else "mlp",
            form=form,
            over_model=axis,
            sensitivity=sensitivity,
            searched_with=together,
        )
        for suffix, form in (("", "linear"), ("_exps", "stack"), ("_shexp", "linear"))
        for name, stage, axis, sensitivity, together in (
            ("ffn_gate", MLP_IN, "rows", 3.0, _PAIR),
            ("ffn_up", MLP_IN, "rows", 3.0, _PAIR),
            ("ffn_down", MLP_OUT, "columns", 2.4, None),
        )
    ),
    *(
        Matrix(name=name, stage=MLP_IN, role="mlp", form="router")
        for name in ("ffn_gate_inp", "ffn_gate_inp_shexp")
    ),
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
