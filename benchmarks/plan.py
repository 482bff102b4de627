"""Which sections there are, in the order in which they run; and the way from a case to something to call."""

from collections.abc import Callable
from types import ModuleType

from . import attention, generation, machine, training
from .cases import Case, Group, Run, Settings

# The most telling first, for runs that end by the clock.
OWNERS: dict[str, ModuleType] = {
    "machine": machine,
    "core": attention,
    "ops": attention,
    "break-even": attention,
    "step": training,
    "growth": attention,
    "depth": training,
    "generation": generation,
    "step growth": training,
}


def plan(settings: Settings, sections: list[str]) -> list[Group]:
    """All groups of the named sections."""
    makers: dict[str, Callable[[Settings], list[Group]]] = {}
    for owner in dict.fromkeys(OWNERS.values()):
        makers |= owner.SECTIONS
    return [group for section in OWNERS if section in sections for group in makers[section](settings)]


def make(case: Case, rival: str) -> Run:
    """The rival on the case, ready to be called."""
    return OWNERS[case.section].make(case, rival)
