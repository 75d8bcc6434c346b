"""The plan: which type every tensor of the file will have, and why."""

from jquant.plan._checks import check_encodable
from jquant.plan._entries import Entry, Plan
from jquant.plan._plan import Settled, plan, settle
from jquant.plan.file_types import ALIASES, FILE_TYPES, FileType, file_type
from jquant.plan.profile import Profile, parse_profile, preset_names, preset_text
from jquant.plan.protect import protect, protect_settled
from jquant.plan.rules import Rule, parse_rule, parse_rules_file, tensor_type
from jquant.plan.runtimes import RUNTIMES, runtime_types
from jquant.plan.shortlist import shortlist
from jquant.plan.targets import (
    Candidates,
    TooSmallError,
    allocated,
    candidates,
    for_damage,
    like,
    price,
)

__all__ = [
    "ALIASES",
    "FILE_TYPES",
    "RUNTIMES",
    "Candidates",
    "Entry",
    "FileType",
    "Plan",
    "Profile",
    "Rule",
    "Settled",
    "TooSmallError",
    "allocated",
    "candidates",
    "check_encodable",
    "file_type",
    "for_damage",
    "like",
    "parse_profile",
    "parse_rule",
    "parse_rules_file",
    "plan",
    "preset_names",
    "preset_text",
    "price",
    "protect",
    "protect_settled",
    "runtime_types",
    "settle",
    "shortlist",
    "tensor_type",
]
