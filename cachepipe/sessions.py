"""Sessions: a conversation with a model, instruction by instruction, through a service and the cache.

    session = Session("You are a calculator.", service=service, namespace="run-1")
    ten = await session.initiate({"sum": "return |x| + |y|"}, context={"x": 7, "y": 3})
    twenty = await session.followup("times 2", temperature=0.5)

What a session asks is drawn like anything else: a rerun, in this process or another one, gets the same
answers without a call.
"""

from __future__ import annotations

import atexit
import json
import os
import weakref
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from cachepipe import context as calls
from cachepipe import runs
from cachepipe.conversations import Conversation, Message
from cachepipe.flow import Limits
from cachepipe.services import Service, Services
from cachepipe.stores import Store, default_folder, open_store
from cachepipe.typedefs import Mode, Repeat, by_value

DEFAULTS: Final[Mapping[str, Any]] = {
    "model": "gpt-4-1106-preview",
    "frequency_penalty": 0,
    "max_tokens": None,
    "n": 1,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "seed": None,
    "stop": None,
    "stream": False,
    "temperature": 0.7,
    "top_p": 1,
    "tools": None,
    "tool_choice": "none",
    "user": None,
}
"""The parameters of a session that says nothing else."""

_FORMAT: Final = "cachepipe-session-1"


class Session:
    """A conversation with a model.

    Calls of one session are made one after the other, in the order in which they were asked for; any number
    of sessions run at once. A call that fails leaves the conversation as it was.

    Args:
        system: the system message: a string or a mapping; None is none.
        service: the endpoint and its limits; default is a new ``Services.OpenAI()``.
        llmconfig: parameters of calls that differ from `DEFAULTS`.
        namespace: the unit within which samples are independent, in practice one experiment;
            `cachepipe.using` goes before it.
        cache: a folder, a ``diskcache.Cache``, a store, or None for the default folder.
        mode: ``"read-write"``, ``"replay"`` (which needs no key), ``"refresh"`` or ``"bypass"``.
        repeat: ``"fresh"``: a repeated question gets a fresh sample; ``"same"``: it gets the same again.
        client: an asynchronous client to use instead of one of the service's; cached as it is.

    Attributes:
        conversation: what was said, the system message first.
        llmconfig: the parameters of calls that say nothing else; a dictionary to change.
    """

    def __init__(
        self,
        system: str | Mapping[str, Any] | None = None,
        *,
        service: Service | None = None,
        llmconfig: Mapping[str, Any] | None = None,
        namespace: str | None = None,
        cache: Any = None,
        mode: Mode = "read-write",
        repeat: Repeat = "fresh",
        client: Any = None,
    ) -> None:
        if service is not None and client is not None:
            raise TypeError("a client has its own endpoint and limits; pass a service or a client, not both")
        if service is not None and not isinstance(service, Service):
            raise TypeError(f"service= takes a Service, such as Services.OpenAI(); got {service!r}")
        if llmconfig is not None and not isinstance(llmconfig, Mapping):
            raise TypeError(f"llmconfig is a mapping of parameters; got {llmconfig!r:.100}")
        self.service = Services.OpenAI() if service is None and client is None else service
        self.namespace = namespace
        self.llmconfig: dict[str, Any] = {**by_value(dict(DEFAULTS)), **_own_model(self.service)}
        self.llmconfig.update(by_value(dict(llmconfig or {})))
        opening = [] if system is None else [Message("system", _text(system))]
        self.conversation = Conversation(opening)
        self._client = client
        self._how: dict[str, Any] = {"mode": mode, "repeat": repeat}
        self._store = None if client is not None else _kept(cache)
        self._pieces: weakref.ref[Pieces] | None = None
        self._turns = _turns()

    def __repr__(self) -> str:
        where = "a client" if self.service is None else self.service.name
        return (
            f"<Session of {len(self.conversation)} messages with {self.llmconfig.get('model')} at {where}, "
            f"namespace {self.namespace!r}>"
        )

    @property
    def system(self) -> str | None:
        """The text of the system message, if there is one."""
        first = next(iter(self.conversation), None)
        return first.text if first is not None and first.role == "system" else None

    async def initiate(
        self,
        instruction: str | Mapping[str, Any],
        context: str | Mapping[str, Any] | None = None,
        *,
        system: str | Mapping[str, Any] | None = None,
        request_id: str | None = None,
        **params: Any,
    ) -> Any:
        """Begin the conversation anew with an instruction, and return the answer; see `followup`.

        Args:
            instruction: what to do.
            context: what to do it with.
            system: another system message than the session was made with.
            request_id: which draw this is among equal questions of the namespace.
            params: parameters of this call that differ from ``llmconfig``.
        """
        said = self.system if system is None else _text(system)
        opening = [] if said is None else [Message("system", said)]
        return await self._ask(opening, [_instruction(instruction, context)], request_id, params)

    async def followup(
        self,
        instruction: str | Mapping[str, Any] | None = None,
        context: str | Mapping[str, Any] | None = None,
        *,
        tool_outputs: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        **params: Any,
    ) -> Any:
        """Go on with the conversation, and return the answer.

        Args:
            instruction: what to do next; may be left out where tools have answered.
            context: what to do it with.
            tool_outputs: what the called tools have returned, by the id of the call.
            request_id: which draw this is among equal questions of the namespace.
            params: parameters of this call that differ from ``llmconfig``. One that is None is left out.

        Returns:
            The text of the answer; where the model calls tools instead, the calls as mappings; an instance
            where ``response_format`` is a pydantic model; with ``n`` above 1 a list of these, the first of
            which goes into the conversation; with ``stream=True`` an asynchronous iterator of pieces of text.
        """
        said = [
            Message("tool", output if isinstance(output, str) else _dumped(output), tool_call_id=call)
            for call, output in (tool_outputs or {}).items()
        ]
        if instruction is not None:
            said.append(_instruction(instruction, context))
        if not said:
            raise ValueError("followup() needs an instruction, or tool_outputs of the calls before")
        return await self._ask(None, said, request_id, params)

    async def _ask(
        self,
        opening: list[Message] | None,
        said: list[Message],
        request_id: str | None,
        params: Mapping[str, Any],
    ) -> Any:
        with await self._turns.enter():
            pieces = None if self._pieces is None else self._pieces()
            if pieces is not None and not pieces.ended:
                raise RuntimeError(
                    "the answer before is still being streamed; read it to its end, or aclose() it"
                )
            messages = [*(self.conversation.messages if opening is None else opening), *said]
            body = self._body(messages, params)
            completions = self._completions()
            using = calls.current()
            whose = using.namespace_of(self.namespace)
            which = using.request_id_of() if request_id is None else request_id
            with calls.using(namespace=whose, request_id=which):
                if body.get("stream"):
                    pieces = Pieces(await completions.create(**body), self, messages)
                    self._pieces = weakref.ref(pieces)
                    return pieces
                if isinstance(body.get("response_format"), type):
                    completion = await completions.parse(**body)
                else:
                    completion = await completions.create(**body)
            answers = [choice.message for choice in completion.choices]
            self.conversation = Conversation([*messages, _message(answers[0])])
        values = [_value(answer) for answer in answers]
        return values if body.get("n", 1) > 1 else values[0]

    def _body(self, messages: list[Message], params: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is sent; what cannot be sent is refused before anything is spent."""
        config = {name: value for name, value in {**self.llmconfig, **params}.items() if value is not None}
        if not isinstance(config.get("model"), str):
            raise ValueError(  # noqa: TRY004 - the usual case is that there is none
                "no model is named; write Session(llmconfig={'model': ...}), or model=... in the call"
            )
        if not config.get("tools"):
            config.pop("tools", None)
            config.pop("tool_choice", None)  # providers take no choice of no tools
        if not config.get("stream"):
            config.pop("stream", None)
        elif config.get("n", 1) > 1:
            raise ValueError("a session streams one answer; ask for n answers with stream=False")
        return {**config, "messages": [message.to_dict() for message in messages]}

    def _completions(self) -> Any:
        client = self._client
        if client is None:
            service: Any = self.service
            client = service.lent(self._store, **self._how)
        return client.chat.completions

    # What becomes of the conversation.

    def branch(self) -> Self:
        """Return another session that goes on from here; the two know nothing of each other any more."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.llmconfig = by_value(self.llmconfig)
        twin.conversation = self.conversation.copy()
        twin._turns = _turns()  # noqa: SLF001 - its own class
        twin._pieces = None  # noqa: SLF001 - likewise
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation, the parameters and the namespace to a file as JSON; no key, no URL.

        A class as ``response_format`` is left out; give it again to `load`.
        """
        llmconfig = {name: value for name, value in self.llmconfig.items() if not isinstance(value, type)}
        saved = {
            "format": _FORMAT,
            "namespace": self.namespace,
            "llmconfig": llmconfig,
            "messages": self.conversation.to_messages(),
        }
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(saved, indent=1), encoding="utf-8")
        beside.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Return a session that goes on where a saved one was.

        Args:
            path: the file.
            options: as for the constructor, but for ``system``; a ``namespace`` or ``llmconfig`` given
                here goes before the saved one.

        Raises:
            ValueError: when the file holds no session.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} holds no session: {error}") from error
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise ValueError(f"{path} holds no session; expected a file that Session.save() has written")
        try:
            namespace, llmconfig, messages = (saved[name] for name in ("namespace", "llmconfig", "messages"))
            conversation = Conversation(messages)
            llmconfig = {**llmconfig, **(options.get("llmconfig") or {})}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds a session that is damaged: {error!r}") from error
        made = cls(**{"namespace": namespace, **options, "llmconfig": llmconfig})
        made.conversation = conversation
        return made


class Pieces(AsyncIterator[str]):
    """The pieces of an answer's text as they come. At the end, the answer is part of the conversation.

    A reader that stops calls `aclose`: what it has read is then what was said. The rest is read in the
    background, so that the sample is kept.

    Attributes:
        text: what has come so far.
        ended: whether there will be no more.
    """

    def __init__(self, stream: Any, session: Session, messages: list[Message]) -> None:
        self._stream = stream
        self._session: Session | None = session
        self._messages = messages
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self.text = ""
        self.ended = False

    async def __anext__(self) -> str:
        while not self.ended:
            try:
                chunk = await anext(self._stream)
            except StopAsyncIteration:
                self._end()
                break
            except BaseException:
                self.ended = True  # the conversation stays as it was
                raise
            for choice in chunk.choices:
                self._note(choice.delta)
                if choice.delta.content:
                    self.text += choice.delta.content
                    piece: str = choice.delta.content
                    return piece
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop reading."""
        if not self.ended:
            self._end()
            await self._stream.close()

    def _note(self, delta: Any) -> None:
        for part in delta.tool_calls or ():
            call = self._tool_calls.setdefault(part.index, {"id": "", "type": "function", "function": {}})
            call["id"] = part.id or call["id"]
            function = call["function"]
            if part.function is not None:
                for name, value in (("name", part.function.name), ("arguments", part.function.arguments)):
                    function[name] = function.get(name, "") + (value or "")

    def _end(self) -> None:
        self.ended = True
        tool_calls = [call for _, call in sorted(self._tool_calls.items())] or None
        session, self._session = self._session, None
        if session is not None and (self.text or tool_calls):
            said = Message("assistant", self.text or None, tool_calls=tool_calls)
            session.conversation = Conversation([*self._messages, said])


def _turns() -> Limits:
    """Return what lets one call through at a time, in order, on whichever loops they are made."""
    return Limits(max_concurrency=1, adaptive=False)


def _text(said: str | Mapping[str, Any]) -> str:
    """Return a text as it is, and a mapping as JSON."""
    if isinstance(said, str):
        return said
    if isinstance(said, Mapping):
        return _dumped(said)
    raise TypeError(f"instructions, contexts and system messages are strings or mappings; got {said!r:.100}")


def _instruction(instruction: str | Mapping[str, Any], context: str | Mapping[str, Any] | None) -> Message:
    """Return the message of an instruction; with a context it is JSON of both."""
    if context is None:
        return Message("user", _text(instruction))
    for value in (instruction, context):
        _text(value)
    return Message("user", _dumped({"instruction": instruction, "context": context}))


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise TypeError(f"what is said must be possible to write as JSON: {error}") from error


def _message(answer: Any) -> Message:
    """Return an answer of the SDK's as a message."""
    tool_calls = [call.model_dump(exclude_none=True) for call in answer.tool_calls or ()] or None
    content = answer.content if answer.content is not None else answer.refusal
    return Message("assistant", content, tool_calls=tool_calls)


def _value(answer: Any) -> Any:
    """Return what a caller gets of an answer."""
    parsed = getattr(answer, "parsed", None)
    if parsed is not None:
        return parsed
    message = _message(answer)
    return message.content if message.content is not None or not message.tool_calls else message.tool_calls


def _own_model(service: Service | None) -> dict[str, Any]:
    return {} if service is None else {"model": service.model}


_stores: dict[Any, tuple[Store, Any, object]] = {}


def _kept(cache: Any) -> Store:
    """Return the store for a cache; one that is opened here stays open, and its run with it, to the end.

    So sessions that come and go one after the other are one run: their equal questions get different samples.
    """
    name = os.path.abspath(os.fspath(cache)) if isinstance(cache, str | os.PathLike) else cache  # noqa: PTH100
    if name is None:
        name = os.path.abspath(default_folder())  # noqa: PTH100 - a string, as the environment may name it
    key = name if isinstance(name, str) else id(name)
    if key not in _stores:
        store, owned = open_store(name)
        if not owned:
            return store
        holder = _Holder()
        runs.opened(store.identity, holder)
        _stores[key] = store, cache, holder
        atexit.register(store.close)
    return _stores[key][0]


class _Holder:
    """Keeps a run going."""
