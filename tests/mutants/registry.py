"""All mutants by name: what each is, where it matters, what must find it, and with what power."""

from mutants import channel, clipping, mixing, noise, sampling
from mutants.mutant import Mutant

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for module in (noise, clipping, sampling, mixing, channel)
    for mutant in module.MUTANTS
}
