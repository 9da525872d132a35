"""One engine under several batch workers: jobs with other prompts or sampling decode in the same continuous batch."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_batch.batch.contract import RowEngine
from dspark_batch.core import Request, Result


@dataclass(slots=True)
class _Ticket:
    view: EngineView
    number: int
    num_missing: int


class SharedEngine:
    """Hands out views of one engine. Driven by one thread; a round of any view is a round of all."""

    def __init__(self, engine: RowEngine) -> None:
        self.engine = engine
        self._tickets: dict[int, _Ticket] = {}

    def view(self) -> EngineView:
        """A ``RowEngine`` of its own, with tickets of its own."""
        return EngineView(self)

    def add(self, request: Request, *, view: EngineView, number: int) -> None:
        self._tickets[self.engine.add(request)] = _Ticket(view, number, request.sampling.n)

    def step(self) -> None:
        """One round of the engine; results wait in the view that asked for them. Raises EngineError when it broke."""
        for key, result in self.engine.step():
            ticket = self._tickets[key]
            ticket.num_missing -= 1
            if ticket.num_missing == 0:
                del self._tickets[key]
            ticket.view.receive(ticket.number, result)

    def check_integrity(self) -> None:
        """The engine holds exactly the samples that the views still wait for."""
        assert sum(ticket.num_missing for ticket in self._tickets.values()) == self.engine.num_unfinished


class EngineView:
    """What one batch worker sees of a shared engine. Closing it leaves the engine to the others."""

    def __init__(self, shared: SharedEngine) -> None:
        self._shared = shared
        self._ready: list[tuple[int, Result]] = []
        self._num_tickets = 0
        self._num_unfinished = 0

    @property
    def num_unfinished(self) -> int:
        return self._num_unfinished

    @property
    def max_concurrency(self) -> int:
        return self._shared.engine.max_concurrency

    @property
    def has_chat_template(self) -> bool:
        return self._shared.engine.has_chat_template

    def add(self, request: Request) -> int:
        number = self._num_tickets
        self._num_tickets += 1
        self._num_unfinished += request.sampling.n
        self._shared.add(request, view=self, number=number)
        return number

    def step(self) -> list[tuple[int, Result]]:
        """What another view's round brought for this one, else a round."""
        if not self._ready:
            self._shared.step()
        ready, self._ready = self._ready, []
        self._num_unfinished -= len(ready)
        return ready

    def receive(self, number: int, result: Result) -> None:
        self._ready.append((number, result))

    def close(self) -> None:
        return
