"""Members of a ``.tortilla`` file that is in memory: the row of the table and the bytes of each."""

from everysat.io.tortilla import unpacked as members

__all__ = ["members"]
