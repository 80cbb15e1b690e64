"""torch.compile for the parts of a network, in place: weights keep their names, copies and wrappers see no difference.

A method may call encoder, decoder and heads each by itself, so each is compiled by itself; a part that is compiled is
still the module it was. One program is made for each shape and mode that a step needs: two to four a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raysemi.models.segmentor import Segmentor

BACKEND_VARIABLE = "RAYSEMI_COMPILE_BACKEND"
"""Environment variable that names another backend of torch.compile."""


def compile_parts(network: Segmentor) -> None:
    """Lets encoder, decoder and heads run compiled from their next call on; a later copy of the network is not."""
    # gradients=pareto runs two backward passes through one graph, whose buffers the first must not take for its own
    torch._functorch.config.donated_buffer = False
    backend = os.environ.get(BACKEND_VARIABLE, "inductor")
    for part in (network.encoder, network.decoder, *network.heads.values()):
        part.compile(backend=backend, dynamic=False)


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, everything that is compiled runs as it was written."""
    with torch.compiler.set_stance("force_eager"):
        yield
