"""Sessions: a conversation with a model, instruction by instruction, through a service and the cache.

    session = Session("You are a calculator.", service=service, namespace="run-1")
    ten = await session.initiate({"sum": "return |x| + |y|"}, context={"x": 7, "y": 3})
    twenty = await session.followup("times 2", temperature=0.5)

The questions of a session are draws like all others: a rerun, in this process or another one, gets the same
answers without calls.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import weakref
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Final, Self, Unpack

from cachepipe.chat.access import Access, completes, is_asynchronous, keeps_cache, say_default
from cachepipe.chat.answers import TextCompletion
from cachepipe.chat.chat import Spoken
from cachepipe.chat.completions import Plan, Reply
from cachepipe.chat.conversations import Conversation, Message
from cachepipe.chat.options import AccessOptions
from cachepipe.context import Using, current
from cachepipe.flow import Limits
from cachepipe.providers.info import Info
from cachepipe.services import Service, Services
from cachepipe.typedefs import by_value, describes

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
"""The default parameters of a session."""

_FORMAT: Final = "cachepipe-session-1"
_MAY_HOLD_KEYS: Final = ("extra_headers", "extra_query")


@describes(AccessOptions)
class Session:
    """A conversation with a model.

    A session makes its calls one after the other, in the order of its method calls. Any number of sessions
    can run concurrently. A call that fails does not change the conversation.

    Args:
        system: the system message: a string or a mapping; None for no message.
        llmconfig: parameters of calls that differ from `DEFAULTS`.
        **options: see `cachepipe.chat.options.AccessOptions`. The default ``service`` is a new
            ``Services.OpenAI()``. `cachepipe.using` overrides ``namespace``, ``replicate`` and ``mode``. The
            ``client`` is asynchronous; only an SDK's client takes ``cache``, ``mode`` and ``repeat``, because
            one of cachepipe's, or any other, has its own cache.

    Attributes:
        conversation: the messages, beginning with the system message.
        llmconfig: the default parameters of calls, as a dictionary that you may change.
        info: what `cachepipe.info` returns for the last answer, such as ``cached``, ``billed`` and ``saved``;
            None before the first answer.

    Raises:
        TypeError, ValueError, StoreError: for arguments that are not valid, or exclude each other.
    """

    def __init__(
        self,
        system: str | Mapping[str, Any] | None = None,
        *,
        llmconfig: Mapping[str, Any] | None = None,
        **options: Unpack[AccessOptions],
    ) -> None:
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        client, service = given.get("client"), given.get("service")
        if not isinstance(llmconfig, Mapping | None):
            raise TypeError(f"llmconfig is a mapping of parameters; got {llmconfig!r:.100}")
        if client is not None:
            _check_client(client, given)
        elif service is None:
            endpoint = {name: given.pop(name) for name in given.keys() & {"api_key", "base_url"}}
            service = given["service"] = Services.OpenAI(**endpoint)
        self.service: Service | None = service
        self._access = Access(given, sdk="openai")
        own = dict(llmconfig or {})
        model = DEFAULTS["model"] if service is None else service.model
        self.llmconfig: dict[str, Any] = by_value({**DEFAULTS, "model": model, **own})
        self._names_model = "model" in own
        opening = [] if system is None else [Message("system", _text(system))]
        self.conversation = Conversation(opening)
        self.info: Info | None = None
        self._pieces: weakref.ref[Pieces] | None = None
        self._turns = _turns()

    def __repr__(self) -> str:
        where = "a client" if self.service is None else self.service.name
        return (
            f"<Session of {len(self.conversation)} messages with {self.llmconfig.get('model')} at {where}, "
            f"namespace {self.namespace!r}>"
        )

    @property
    def namespace(self) -> str | None:
        """The namespace outside all blocks of `cachepipe.using`."""
        return self._access.settings.get("namespace")

    @property
    def replicate(self) -> str | int | None:
        """The replicate outside all blocks of `cachepipe.using`."""
        return self._access.settings.get("replicate")

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
        """Start the conversation again with an instruction, and return the answer; see `followup`.

        Args:
            instruction: the instruction.
            context: the data for it.
            system: replaces the session's system message.
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
        """Continue the conversation, and return the answer.

        Args:
            instruction: the next instruction; optional with ``tool_outputs``.
            context: the data for it.
            tool_outputs: the results of the called tools, by the id of the call.
            request_id: which draw this is among equal questions of the namespace.
            params: parameters of this call that differ from ``llmconfig``. One that is None is left out.

        Returns:
            The text of the answer; the calls as mappings, if the model calls tools instead; an instance, if
            ``response_format`` is a pydantic model. With ``n`` above 1, a list of these; the first one is
            added to the conversation. With ``stream=True``, an asynchronous iterator of pieces of text.
        """
        if not isinstance(tool_outputs or {}, Mapping):
            raise TypeError(
                f"tool_outputs is a mapping of results by the id of the call; got {tool_outputs!r:.100}"
            )
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
                    "the previous answer is still being streamed; read it to its end, or call its aclose()"
                )
            before = self.conversation.messages if opening is None else opening
            conversation = Conversation(before)
            _check_answers(conversation, said)
            conversation.messages.extend(said)
            settings = current().over(Using(**{"request_id": None, **self._access.settings}))
            if request_id is not None:
                settings = settings._replace(request_id=request_id)
            plan, fields = self._plan(params)
            reply = await self._access.run(lambda: plan.ask(conversation, fields, **settings.for_calls()))
            if fields.get("stream"):
                pieces = Pieces(self, reply)
                self._pieces = weakref.ref(pieces)
                return pieces
            completions = reply.completions()
            self._heard(reply, completions[0].to_message())
        values = [_value(completion) for completion in completions]
        return values if fields.get("n", 1) > 1 else values[0]

    def _heard(self, reply: Reply, said: Message) -> None:
        self.conversation = Conversation([*reply.conversation, said])
        self.info = reply.info

    def _plan(self, params: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
        """Return what to ask, and the fields ``n`` and ``stream``.

        Parameters that cannot be sent are refused before anything is spent.
        """
        config = {name: value for name, value in {**self.llmconfig, **params}.items() if value is not None}
        extra = config.get("extra_body")
        if isinstance(extra, Mapping) and (wrong := {"n", "stream"} & extra.keys()):
            raise TypeError(f"{min(wrong)}= is given by itself, not in extra_body=")
        fields = _taken_fields(config)
        if config.get("model") == DEFAULTS["model"] and not (self._names_model or "model" in params):
            say_default(DEFAULTS["model"], "llmconfig={'model': ...} or model= names another")
        if not isinstance(config.get("model"), str):
            raise ValueError(  # noqa: TRY004 - the usual case is that there is none
                "no model is named; write Session(llmconfig={'model': ...}), or model=... in the call"
            )
        if not config.get("tools"):
            config.pop("tool_choice", None)  # providers take no choice of no tools
        return Plan(self._access, config), fields

    # Copies and files.

    def branch(self) -> Self:
        """Return a copy of the session that continues independently."""
        twin = copy.copy(self)
        twin.llmconfig = by_value(self.llmconfig)
        twin.conversation = self.conversation.copy()
        twin._turns = _turns()  # noqa: SLF001 - its own class
        twin._pieces = None  # noqa: SLF001 - likewise
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation, the parameters, the namespace and the replicate to a file as JSON.

        The file has no key and no URL. A class as ``response_format`` is left out, and so are
        ``extra_headers`` and ``extra_query``, which may hold keys; give them again to `load`.
        """
        llmconfig = {
            name: value
            for name, value in self.llmconfig.items()
            if not isinstance(value, type) and name not in _MAY_HOLD_KEYS
        }
        saved = {
            "format": _FORMAT,
            "namespace": self.namespace,
            "replicate": self.replicate,
            "llmconfig": llmconfig,
            "messages": self.conversation.to_messages(),
        }
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(saved, indent=1), encoding="utf-8")
        beside.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Return a session that continues a saved one.

        Args:
            path: the file.
            options: as for the constructor, except ``system``; ``namespace``, ``replicate`` and
                ``llmconfig`` override the saved ones.

        Raises:
            TypeError: for ``system``, which the saved session has.
            ValueError: when the file does not contain a session.
        """
        if "system" in options:
            raise TypeError(
                "a saved session has its system message; initiate(system=...) begins with another"
            )
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} holds no session: {error}") from error
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise ValueError(f"{path} holds no session; expected a file that Session.save() has written")
        try:
            conversation = Conversation(saved["messages"])
            given = {name: saved[name] for name in ("namespace", "replicate")} | options
            given["llmconfig"] = {**saved["llmconfig"], **(options.get("llmconfig") or {})}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds a session that is damaged: {error!r}") from error
        made = cls(**given)
        made.conversation = conversation
        return made


class Pieces(Spoken):
    """The pieces of an answer's text as they come. At the end, the answer is part of the conversation.

    A reader that stops early calls `aclose`: the part that it has read becomes the answer in the
    conversation. The rest is read in the background, so that the sample is stored.

    Attributes:
        ended: whether there are no more pieces.

    Raises:
        BadAnswer: when the stream ends before the answer does; the conversation stays as it was.
    """

    def __init__(self, session: Session, reply: Reply) -> None:
        super().__init__(self._parts(), session._access)  # noqa: SLF001 - a part of it
        self._session = session
        self._reply = reply
        self._pieces: list[str] = []
        self.ended = False

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    async def __anext__(self) -> str:
        try:
            return await super().__anext__()
        except BaseException:
            self.ended = True  # also if the reader is cancelled, before the loop of the calls notices
            raise

    async def _parts(self) -> AsyncGenerator[str | TextCompletion, None]:
        try:
            async with contextlib.aclosing(self._reply.parts()) as parts:
                async for part in parts:
                    if isinstance(part, TextCompletion):
                        self._session._heard(self._reply, part.to_message())  # noqa: SLF001 - a part of it
                    else:
                        self._pieces.append(part)
                    yield part
        finally:
            self.ended = True

    async def _end(self) -> None:
        if not self.ended and self.text:
            self._session._heard(self._reply, Message("assistant", self.text))  # noqa: SLF001 - likewise
        self.ended = True
        await super()._end()
        await self._reply.close()  # the iteration may not have begun


def _check_client(client: Any, options: Mapping[str, Any]) -> None:
    """Refuse a client without awaited chat completions, and options that it has itself."""
    if "service" not in options and not (completes(client) and is_asynchronous(client)):
        raise TypeError(
            "client= takes an asynchronous client with chat.completions, such as AsyncOpenAI(); "
            f"got {client!r:.200}"
        )
    if keeps_cache(client) and options.keys() & {"cache", "mode", "repeat"}:
        raise TypeError(
            "the client has its own cache: leave out cache=, mode= and repeat=, or give them to it"
        )


def _taken_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Take ``n`` and ``stream`` out of the parameters of a call, and return those that are sent."""
    fields: dict[str, Any] = {name: config.pop(name) for name in ("n", "stream") if name in config}
    n = fields.get("n", 1)
    if type(n) is not int or n < 1:
        raise ValueError(f"n is a whole number, at least 1; got {n!r:.100}")
    if not fields.get("stream"):
        fields.pop("stream", None)
    elif n > 1:
        raise ValueError("a session streams one answer; ask for n answers with stream=False")
    return fields


def _turns() -> Limits:
    """Return a context manager that allows one call at a time, in order, on any loops."""
    return Limits(max_concurrency=1, adaptive=False)


def _text(said: str | Mapping[str, Any]) -> str:
    """Return a text unchanged, and a mapping as JSON."""
    if isinstance(said, str):
        return said
    if isinstance(said, Mapping):
        return _dumped(said)
    raise TypeError(f"instructions, contexts and system messages are strings or mappings; got {said!r:.100}")


def _instruction(instruction: str | Mapping[str, Any], context: str | Mapping[str, Any] | None) -> Message:
    """Return the message of an instruction; with a context, it is JSON of both."""
    if context is None:
        return Message("user", _text(instruction))
    for value in (instruction, context):
        _text(value)
    return Message("user", _dumped({"instruction": instruction, "context": context}))


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise TypeError(
            f"instructions, contexts and tool outputs must be possible to write as JSON: {error}"
        ) from error


def _value(completion: TextCompletion) -> Any:
    """Return an answer in the form for the caller: an instance, a text, or calls of tools."""
    if completion.parsed is not None:
        return completion.parsed
    text = completion.to_message().content
    return completion.tool_calls if text is None else text


def _check_answers(conversation: Conversation, said: list[Message]) -> None:
    """Refuse what providers refuse: outputs of calls that are not open, and calls without an output."""
    given = [message.tool_call_id for message in said if message.role == "tool"]
    for call in given:
        conversation.check_open(call)
    if missing := [call for call in conversation.open_calls() if call not in given]:
        named = ", ".join(map(repr, missing))
        raise ValueError(f"the model waits for the results of its tool calls: give tool_outputs= for {named}")
