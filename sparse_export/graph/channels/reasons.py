"""Why channels have to stay, in words: every sentence that a pin is given, for orders and for channels that go.

`where` is an operation as messages call it, `name` a parameter.
"""

from __future__ import annotations

OUTPUT = "an output of the network"
ONE_CHANNEL = "there is one channel"
LAST_CHANNEL = "one channel has to stay"
TOGETHER = "several operations together treat each channel differently"


def unknown(where: str, why: str = "") -> str:
    """No rule follows an operation."""
    return f"{where} is not a known operation" + (f" ({why})" if why else "")


# What parameters are


def shared_memory(name: str) -> str:
    return f"{name} shares its memory with another tensor"


def unclear(where: str, name: str) -> str:
    return f"{where} reads {name}, whose channels are not clear"


def as_numbers(where: str) -> str:
    return f"{where} reads it as numbers"


def read_and_written(where: str, name: str) -> str:
    return f"{where}: {name} is read and written along one axis"


def groups_differ(where: str, name: str, a: int, b: int) -> str:
    return f"{where}: {name} is used with {a} and {b} groups"


def several_axes(where: str, n: int) -> str:
    return f"{where} has parameters over {n} axes"


def used_differently(name: str) -> str:
    return f"{name} is used in different ways"


def shared_weight(where: str) -> str:
    return f"{where} shares its weight"


# What operations do to values


def mixed_with_fixed(where: str) -> str:
    return f"{where}: some of what it reads moves and some does not"


def also_meets_fixed(where: str, name: str) -> str:
    return f"{where}: {name} also meets values that stay in place"


def another_axis(where: str) -> str:
    return f"{where} works along another axis than the channels'"


def read_along_another(where: str) -> str:
    return f"{where} reads it along another axis"


def along_channels(where: str) -> str:
    return f"{where} works along the channels"


def every_with_every(where: str) -> str:
    return f"{where} multiplies every channel with every other"


def fixed_state(where: str) -> str:
    return f"{where} begins with a state that stays in place"


def several_entries(where: str, name: str) -> str:
    return f"{where}: several entries of {name} are one channel"


def told_apart(where: str) -> str:
    return f"{where} treats each channel differently"


# What channels that go meet besides


def needs_all(where: str) -> str:
    return f"{where} needs every channel of it"


def nothing_before(where: str) -> str:
    return f"nothing before {where} can lose channels"


def beside_fixed(where: str) -> str:
    return f"{where} joins it with what cannot lose channels"


def spread(where: str) -> str:
    return f"{where} spreads it over all channels"


def picked(where: str) -> str:
    return f"{where} picks from it by number"


def read_on(where: str) -> str:
    return f"{where} reads what goes with it"


def border_differs(where: str) -> str:
    return f"{where} pads it, so that its border differs"
