"""The draws of the lines of a file: each line is an exchange with the cache, like a client's call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from cachepipe import jsontext, runs, wire
from cachepipe.batch.lines import Line
from cachepipe.batch.report import Report
from cachepipe.batch.settings import BatchSettings
from cachepipe.contract.draws import Claimant, Draw, Identity, Numbered, draw_of, label
from cachepipe.contract.keys import Question, digest
from cachepipe.errors import UnkeyableValue
from cachepipe.models.connection import Connection, SdkCalls
from cachepipe.models.openai import ENDPOINTS, OpenAIModel
from cachepipe.providers.exchange import CacheView, Exchange, SharedStore, questions_of
from cachepipe.providers.lists import Lists
from cachepipe.stores.base import Store
from cachepipe.stores.misses import lacking
from cachepipe.typedefs import Response
from cachepipe.wire import Ask

_NOWHERE: Final = ""  # the scope under which a line's questions are counted
_COUNTED: Final = 10_000  # identities of a file whose occurrences are kept in memory


class LineDraw(NamedTuple):
    """A line's draw.

    Attributes:
        line: the line.
        claimant: who draws.
        occurrences: per question, the number of earlier lines of the file that ask the same.
        questions: its questions under no server; None if they have no key.
        id: identifies the draw in results: a digest of the claimant, the questions without their server, and
            the occurrences.
    """

    line: Line
    claimant: Claimant
    occurrences: Sequence[int]
    questions: Sequence[Question] | None
    id: str

    def counter(self, keys: Sequence[str]) -> Numbered:
        """Return what gives each question of the line, by its key, its number."""
        return Numbered(zip(keys, self.occurrences, strict=True))


def endpoint_of(connection: Connection, line: Line) -> str:
    """Return where a line is sent: a path below the base URL, or a whole URL."""
    return ENDPOINTS.get(line.api) or connection.place_of(line.url)


class LineExchange(SdkCalls, Exchange):
    """A line of a file, answered from the cache or through the SDK. Its answer is made of samples only."""

    def __init__(
        self,
        model: OpenAIModel,
        view: CacheView,
        lists: Lists,
        draw: LineDraw,
        url: str,
        questions: list[Question],
    ) -> None:
        line = draw.line
        self._refusal = line.refusal
        self.connection, self.endpoint = model.connection, endpoint_of(model.connection, line)
        super().__init__(
            view,
            line.api,
            line.body,
            line.asks,
            url,
            self.connection.headers,
            stream=False,
            alone=False,
            mode=view.mode,
            claimant=draw.claimant,
            lists=lists,
            max_n=model.max_n,
            questions=questions,
        )
        self.spans = not self.connection.only_replays
        self.counter = draw.counter(self.record.keys)

    async def called(self, asks: Sequence[Ask], n: int) -> Sequence[Any]:
        """Return the samples of one call as they are stored.

        Raises:
            BadAnswer: when the response is not an answer.
        """
        return self._packed(*await self.paid(asks, n))

    def keep(self) -> None:
        """Keep the body without copying it: it was read from the file, so nothing else can change it."""

    async def answered(self) -> tuple[bytes, Sequence[Response]]:
        """Return the body of the answer, and the samples of each question with their flags.

        Raises:
            TooManySamples: when the line asks for too many.
        """
        if self._refusal is not None:
            raise self._refusal
        answer = self.known()
        if answer is None:
            answer = await self.drawn()
        content, responses = answer.content, self.record.responses
        if not isinstance(content, bytes) or responses is None:
            raise TypeError("a line has no stream")
        return content, responses


class FileDraws:
    """The draws of the lines of a file, over one store and one client.

    Args:
        model: makes the calls.
        store: the store.
        settings: the settings of the run.
        report: gets the figures of the calls.
    """

    def __init__(self, model: OpenAIModel, store: Store, settings: BatchSettings, report: Report) -> None:
        self._model = model
        self._settings = settings
        self._report = report
        self._store = store
        self._view = CacheView(
            SharedStore(store),
            settings.namespace,
            settings.mode,
            settings.scope,
            settings.repeat,
            budget=settings.budget,
        )
        self._lists = Lists(shared=True)
        # The run gives the numbers of failed requests back, so the lines are counted here.
        self._counted = runs.Occurrences(_COUNTED)
        report.spent = model.spent

    def draws(self, line: Line) -> Iterator[LineDraw]:
        """Iterate over the draws of the next line of the file, one for each replicate, and count them."""
        request_id = line.custom_id if self._settings.ids and line.named else None
        questions = self._asked(line)
        # A question without a key counts as nothing; making its exchange raises the error.
        asked = [""] * len(line.asks) if questions is None else [question.key for question in questions]
        for replicate in self._settings.each_replicate:
            claimant = Claimant(self._settings.namespace, request_id, replicate)
            whose = label(claimant.namespace), request_id or "", label(replicate)
            occurrences = [self._counted.take(Identity(whose[0], key, whose[1], whose[2])) for key in asked]
            named = jsontext.dumps([*whose, asked, occurrences])
            name = hashlib.blake2b(named, digest_size=12).hexdigest()
            yield LineDraw(line, claimant, occurrences, questions, name)

    def planned(self, draw: LineDraw) -> tuple[str, tuple[list[Question], Sequence[Ask], list[Draw]]]:
        """Return the URL of a line's calls, and its questions, asks and draws, without making an exchange.

        Raises:
            UnkeyableValue: when no stable key can be made from one of its values.
        """
        line = draw.line
        url, questions = self._questions(draw)
        counter = draw.counter([question.key for question in questions])
        shares = self._view.cache(self._settings.mode).shares
        draws = [
            draw_of(question.key, draw.claimant, counter, shared=shares(question)) for question in questions
        ]
        return url, (questions, line.asks, draws)

    def reasons(self, draw: LineDraw) -> list[tuple[str, str]]:
        """Return the key of each question of a line that lacks samples, and why. Reads the store.

        Raises:
            UnkeyableValue: when no stable key can be made from one of its values.
        """
        planned = zip(*self.planned(draw)[1], strict=True)
        asked = [(question, ask.n, drawn) for question, ask, drawn in planned]
        return lacking(self._store, asked, draw.claimant.namespace)

    def _questions(self, draw: LineDraw) -> tuple[str, list[Question]]:
        """Return the URL of a line's calls, and its questions under the scope of the run."""
        line, known = draw.line, draw.questions
        url, scope = self._url(line), self._settings.scope
        actual, named = wire.named_scope(scope, wire.scope_of(url), line.api)
        if known is None or named is not wire.named_scope(_NOWHERE, wire.scope_of(url), line.api)[1]:
            return url, questions_of(line.api, line.asks, url, self._model.connection.headers, scope=scope)
        return url, [each._replace(key=digest(actual, each.document), scope=actual) for each in known]

    def _asked(self, line: Line) -> list[Question] | None:
        """Return the questions of a line without their server; None if one of them has no key.

        An unreachable address must not cost the results of another one.
        """
        headers = self._model.connection.headers
        try:
            return questions_of(line.api, line.asks, self._url(line), headers, scope=_NOWHERE)
        except UnkeyableValue:
            return None

    def _url(self, line: Line) -> str:
        connection = self._model.connection
        return connection.scope_of(endpoint_of(connection, line), line.body.get("model"))

    def exchange(self, draw: LineDraw) -> LineExchange:
        """Return the exchange of a line.

        Raises:
            UnkeyableValue: when no stable key can be made from one of its values.
        """
        return LineExchange(self._model, self._view, self._lists, draw, *self._questions(draw))

    def count(self) -> None:
        """Bring the report's figures of calls up to date."""
        self._report.calls = self._model.calls
        stats = [cache.stats() for cache in self._view.caches.values()]
        self._report.generated = sum(each.generated for each in stats)

    async def close(self) -> None:
        """Wait for what is in flight, write it, and close the client if it was made here."""
        await self._view.shared_store.close()
        self.count()
        await self._model.close()
