"""The list of sections, and the functions that turn cases into runs."""

from collections.abc import Callable
from typing import NamedTuple

from . import attention, environment, generation, rivals, training
from .cases import Case, Group, Run, Settings


class Section(NamedTuple):
    groups: Callable[[Settings], list[Group]]
    make: Callable[[Case, str], Run]


# Most important first, for runs with a time limit.
SECTIONS = {
    "machine": Section(environment.groups, environment.make),
    "core": Section(attention.core_groups, attention.make_core_run),
    "centering": Section(attention.centering_groups, attention.make_core_run),
    "ops": Section(attention.op_groups, attention.make_op),
    "break-even": Section(attention.break_even_groups, attention.make_core_run),
    "step": Section(training.step_groups, training.make),
    "coverage": Section(training.coverage_groups, training.make),
    "autocast": Section(training.autocast_groups, training.make),
    "growth": Section(attention.growth_groups, attention.make_core_run),
    "depth": Section(training.depth_groups, training.make),
    "generation": Section(generation.groups, generation.make),
    "prefill": Section(generation.prefill_groups, generation.make_prefill),
    "step-growth": Section(training.growth_groups, training.make),
    "classifier": Section(rivals.classifier_groups, rivals.make),
    "causal": Section(rivals.causal_groups, rivals.make),
}


def plan(settings: Settings, sections: list[str], impls: list[str] | None = None) -> list[Group]:
    """Return all groups of the named sections, with all implementations or the named ones."""
    groups = [group for name, section in SECTIONS.items() if name in sections for group in section.groups(settings)]
    names = {entry.impl for group in groups for entry in group.entries}
    if unknown := set(impls or []) - names:
        raise ValueError(f"--impls {sorted(unknown)} are not in these sections, which hold {sorted(names)}.")
    if impls is None:
        return groups
    cut = [group._replace(entries=[entry for entry in group.entries if entry.impl in impls]) for group in groups]
    return [group for group in cut if group.entries]


def make(case: Case, impl: str) -> Run:
    """Make the run of an implementation on a case."""
    return SECTIONS[case.section].make(case, impl)
