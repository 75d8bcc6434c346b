"""The plan: which type every tensor of the file will have, and why."""

from jquant.plan._checks import NEED_IMPORTANCE, check_encodable
from jquant.plan._entries import Entry, Plan, fitted
from jquant.plan._plan import Settled, assemble, like, plan, settle
from jquant.plan._protect import protect, protect_settled
from jquant.plan.file_types import ALIASES, FILE_TYPES, FileType, file_type, nearest_file_type
from jquant.plan.profile import Profile, parse_profile, preset_names, preset_text, profile_text, read_profile
from jquant.plan.rules import Rule, parse_rule, parse_rules_file, tensor_type
from jquant.plan.runtimes import RUNTIMES, runtime_types

__all__ = [
    "ALIASES",
    "FILE_TYPES",
    "NEED_IMPORTANCE",
    "RUNTIMES",
    "Entry",
    "FileType",
    "Plan",
    "Profile",
    "Rule",
    "Settled",
    "assemble",
    "check_encodable",
    "file_type",
    "fitted",
    "like",
    "nearest_file_type",
    "parse_profile",
    "parse_rule",
    "parse_rules_file",
    "plan",
    "preset_names",
    "preset_text",
    "profile_text",
    "protect",
    "protect_settled",
    "read_profile",
    "runtime_types",
    "settle",
    "tensor_type",
]
