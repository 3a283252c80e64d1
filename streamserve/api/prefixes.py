"""The prefix cache for those who look into it: its tree, what it knows of a prompt, pins.

Owns the shapes of these answers, and which of them show texts. Knows nothing of generation.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from anyio import CapacityLimiter, to_thread
from msgspec import Struct, field

from streamserve.api.auth import given_key
from streamserve.api.forms import Forms
from streamserve.api.openai import chat_options
from streamserve.api.query import number, query_of
from streamserve.api.results import CacheTree, Evicted, LookedUp, PinnedNodes, PinState
from streamserve.api.routes import Key, RouteSpec
from streamserve.api.schema import ChatRequest, Message, convert, load_object, messages_of
from streamserve.api.service import Service
from streamserve.api.stream import Prompt
from streamserve.api.wire import Exchange
from streamserve.errors import InvalidRequest, NotFound
from streamserve.media.family import Prepared
from streamserve.messages import MEDIA_BASE, GenerateRequest, MatchEnd, NodeSummary, PinSummary, PrefixMatch, SamplingParams
from streamserve.text.message_ranges import Range
from streamserve.text.pictures import is_picture
from streamserve.text.tokenizer import Tokenizer

MAX_NODES, MAX_DEPTH, MAX_PREVIEW = 1000, 16, 512
MAX_PREVIEWED = 32_768  # tokens of an answer
INLINE_PREVIEWED = 512  # decoded on the loop
MAX_NODE_ID = (1 << 48) - 1
NODES, DEPTH, PREVIEW = 200, 1, 16  # when a request leaves them out

TREE_QUERY = (
    ("node", "whose descendants; 0, the default, is the root"),
    ("depth", f"levels below it, 1 to {MAX_DEPTH}; 1 when left out"),
    ("limit", f"nodes, 1 to {MAX_NODES}; {NODES} when left out"),
    ("preview", f"tokens of each node to show as text, 0 to {MAX_PREVIEW}; {PREVIEW} when left out"),
)
PINS_QUERY = TREE_QUERY[3:]


class NodeRequest(Struct, kw_only=True):
    """Body of POST /cache/pin and POST /cache/evict: a node of GET /cache/tree."""

    node: int


class LookupRequest(ChatRequest, kw_only=True):
    """Body of POST /cache/lookup: one of POST /v1/chat/completions, or a prompt, as text or as token ids, instead of messages."""

    messages: list[Message] = field(default_factory=list)
    prompt: str | list[int] | None = None


class Prefixes:
    """These routes."""

    def __init__(self, service: Service, forms: Forms) -> None:
        self._service = service
        self._forms = forms
        self._inspection = service.client.inspection
        self._limiter = CapacityLimiter(1)  # threads for many previews

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        lookup = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
        return [
            RouteSpec("GET", "/cache/tree", self.tree, result=CacheTree, query=TREE_QUERY, errors=(404,)),
            RouteSpec("GET", "/cache/pins", self.pins, result=PinnedNodes, query=PINS_QUERY),
            RouteSpec("POST", "/cache/lookup", self.look_up, LookupRequest, LookedUp, example=lookup),
            RouteSpec("POST", "/cache/pin", self.pin, NodeRequest, PinState, key=Key.ADMIN, errors=(409,)),
            RouteSpec("DELETE", "/cache/pin/{node}", self.unpin, result=PinState, key=Key.ADMIN),
            RouteSpec("POST", "/cache/evict", self.evict, NodeRequest, Evicted, key=Key.ADMIN, errors=(409,)),
        ]

    # ---- the tree ------------------------------------------------------------------------------------------------

    async def tree(self, exchange: Exchange) -> None:
        """GET /cache/tree: nodes of the prefix tree, level by level, the newest first. A node's number stays the same while
        it lives; where one is split, the lower half keeps it."""
        query = query_of(exchange, *(name for name, _ in TREE_QUERY))
        node = number(query, "node", 0, MAX_NODE_ID) or 0
        depth, limit = number(query, "depth", 1, MAX_DEPTH) or DEPTH, number(query, "limit", 1, MAX_NODES) or NODES
        num_first = self._previewed(exchange, number(query, "preview", 0, MAX_PREVIEW), limit)
        nodes, is_cut = self._inspection.nodes(node, depth=depth, limit=limit, num_first=num_first or 0)
        summary = self._service.client.cache_summary(0)
        counts = {
            "num_nodes": summary.num_nodes,
            "cached_tokens": summary.cached_tokens,
            "evictable_tokens": summary.evictable_tokens,
            "free_tokens": summary.free_tokens,
            "total_tokens": summary.total_tokens,
            "prompt_tokens_seen": summary.prompt_tokens_seen,
            "prompt_tokens_hit": summary.prompt_tokens_hit,
            "hit_rate": summary.hit_rate,
            **_counts(summary.pins),
        }
        shown = await self._shown(nodes, has_previews=num_first is not None)
        await exchange.answer_json({"node": node, "nodes": shown, "is_cut": is_cut, **counts, **self._about_texts(exchange)})

    async def pins(self, exchange: Exchange) -> None:
        """GET /cache/pins: the nodes that are pinned, the oldest first."""
        query = query_of(exchange, *(name for name, _ in PINS_QUERY))
        wanted = number(query, "preview", 0, MAX_PREVIEW)
        num_pins = self._service.client.cache_summary(0).pins.num_pins
        num_first = self._previewed(exchange, wanted, max(1, num_pins))
        nodes = self._inspection.pinned_nodes(num_first=num_first or 0)
        summary = self._service.client.cache_summary(0).pins
        shown = await self._shown(nodes, has_previews=num_first is not None)
        await exchange.answer_json({"nodes": shown, **_counts(summary), **self._about_texts(exchange)})

    def _previewed(self, exchange: Exchange, wanted: int | None, num_nodes: int) -> int | None:
        """How many tokens of each node to show; None: none, since the asker may not see them."""
        if self._why_no_texts(exchange) is not None:
            return None
        if wanted is None:
            return min(PREVIEW, MAX_PREVIEWED // num_nodes)
        if wanted * num_nodes > MAX_PREVIEWED:
            raise InvalidRequest(
                f"preview is {wanted} for up to {num_nodes} nodes, together {wanted * num_nodes} tokens; allowed are "
                f"{MAX_PREVIEWED} in all",
                param="preview",
            )
        return wanted

    def _why_no_texts(self, exchange: Exchange) -> str | None:
        return self._service.door.why_no_texts(exchange.scope, given_key(exchange.scope))

    def _about_texts(self, exchange: Exchange) -> dict[str, Any]:
        why = self._why_no_texts(exchange)
        return {"previews": why is None, "previews_reason": why}

    async def _shown(self, nodes: Sequence[NodeSummary], *, has_previews: bool) -> list[dict[str, Any]]:
        def show() -> list[dict[str, Any]]:
            tokenizer = self._service.text.tokenizer
            return [_shown(node, preview(tokenizer, node.first_token_ids) if has_previews else None) for node in nodes]

        if sum(len(node.first_token_ids) for node in nodes) <= INLINE_PREVIEWED:
            return show()
        return await to_thread.run_sync(show, limiter=self._limiter)

    # ---- a prompt ------------------------------------------------------------------------------------------------

    async def look_up(self, exchange: Exchange) -> None:
        """POST /cache/lookup: how much of a prompt the cache knows, which of its messages and pictures that is, and why no more.
        Nothing is generated, and nothing counts as used."""
        request = convert(load_object(await exchange.body(self._service.max_body_bytes)), LookupRequest)
        self._service.check_model(request.model)
        if (request.prompt is None) == (not request.messages):
            raise InvalidRequest("give either prompt or messages", param="prompt" if request.messages else "messages")
        if request.prompt is None:
            prompt, parts = await self._of_chat(exchange, request)
        else:
            prompt, parts = await self._of_prompt(request.prompt), {"per_message": None, "per_message_reason": NO_MESSAGES}
        sampling = SamplingParams(prompt_logprobs=request.prompt_logprobs)
        given = GenerateRequest("lookup", prompt.token_ids, sampling, request.cache_salt, media=prompt.media)
        shows_texts = self._why_no_texts(exchange) is None
        match = self._inspection.look_up(given, looks_elsewhere=shows_texts)
        messages = parts["per_message"]
        for part in [*(messages or ()), *parts.get("pictures", ())]:
            if part["start"] is not None:
                part["matched"] = min(max(0, match.num_tokens - part["start"]), part["tokens"])
        await exchange.answer_json(
            {
                "tokens": len(prompt.token_ids),
                "matched": match.num_tokens,
                "path": match.path,
                **{"pictures": [], **parts},
                "reason": self._reason(match, given, messages or (), shows_texts=shows_texts),
            }
        )

    async def _of_prompt(self, given: str | list[int]) -> Prompt:
        prompts = self._service.prompts
        ids = await prompts.of_text(given, "prompt") if isinstance(given, str) else prompts.check_ids(given, "prompt")
        if not ids:
            raise InvalidRequest("prompt has no tokens; at least 1 is needed", param="prompt")
        return Prompt(ids)

    async def _of_chat(self, exchange: Exchange, request: LookupRequest) -> tuple[Prompt, dict[str, Any]]:
        """A chat's prompt, and its parts as they will be shown."""
        service = self._service
        chat = messages_of(request.messages, takes=service.takes)
        form = await self._forms.of_chat(request)
        options = chat_options(request, form.shown_tools)
        pictures = await service.prepared(chat.pictures, service.caller(exchange))
        prompt = await service.prompts.of_chat(chat.messages, options, pictures)
        ranges = await service.prompts.ranges_of(chat.messages, options, pictures, prompt.token_ids)
        shown = _pictures(chat.messages, pictures, prompt)
        if ranges is None:
            return prompt, {"per_message": None, "per_message_reason": UNKNOWN_PLACES, "pictures": shown}
        messages = [_message(index, message, ranges[index], shown) for index, message in enumerate(chat.messages)]
        return prompt, {"per_message": messages, "per_message_reason": None, "pictures": shown}

    def _reason(
        self, match: PrefixMatch, given: GenerateRequest, messages: Sequence[dict[str, Any]], *, shows_texts: bool
    ) -> dict[str, Any]:
        at, tokenizer = match.num_tokens, self._service.text.tokenizer
        token = preview(tokenizer, given.token_ids[at : at + 1])
        other = preview(tokenizer, (match.other,)) if shows_texts and match.other is not None else None
        inside = [m["index"] for m in messages if m["start"] is not None and m["start"] <= at < m["start"] + m["tokens"]]
        return {
            "code": match.end.value,
            "message": _sentence(match, given, other),
            "position": at,
            "in_message": inside[0] if inside else None,
            "token": token,
            "cached_token": other,
        }

    # ---- pins ----------------------------------------------------------------------------------------------------

    async def _node_in_body(self, exchange: Exchange) -> int:
        return _checked(convert(load_object(await exchange.body(self._service.max_body_bytes)), NodeRequest).node)

    async def pin(self, exchange: Exchange) -> None:
        """POST /cache/pin: keep a node, and the path to it, from being evicted. Pins hold at most half of the memory, and are
        given up, the oldest first, for a request that has no room to run beside them."""
        node = await self._node_in_body(exchange)
        await exchange.answer_json({"node": node, "is_pinned": True, **_counts(self._inspection.pin(node))})

    async def unpin(self, exchange: Exchange) -> None:
        """DELETE /cache/pin/{node}: let a node be evicted again. It counts as used just now."""
        given: str = exchange.scope["path_params"]["node"]
        if not (given.isascii() and given.isdigit() and len(given) < 15):
            raise NotFound(f"the prefix tree has no node {given[:100]!r}; nodes have whole numbers")
        await exchange.answer_json({"node": int(given), "is_pinned": False, **_counts(self._inspection.unpin(int(given)))})

    async def evict(self, exchange: Exchange) -> None:
        """POST /cache/evict: forget a node and all below it, unless a running request or a pin holds any of them."""
        node = await self._node_in_body(exchange)
        num_nodes, freed_tokens = self._inspection.evict(node)
        await exchange.answer_json({"node": node, "num_nodes": num_nodes, "freed_tokens": freed_tokens})


NO_MESSAGES = "the prompt has no messages"
UNKNOWN_PLACES = (
    "where messages stand in the prompt is not known: "
    "the chat template, or the tokenizer, changes their texts in a way that hides it"
)
SENTENCES = {
    MatchEnd.COMPLETE: "All of it is known; the last token of a prompt is always computed.",
    MatchEnd.EVICTED: "What followed was known, and has been evicted to make room.",
    MatchEnd.NEW: "What follows was not computed before, or is long forgotten.",
    MatchEnd.OTHER_SALT: "More of it is known under another cache_salt; prompts of different salts share nothing.",
    MatchEnd.PICTURE: "The known part ends inside a picture, which this model computes whole.",
}


def _sentence(match: PrefixMatch, given: GenerateRequest, other: str | None) -> str:
    if match.end is MatchEnd.OFF:
        if given.sampling.prompt_logprobs is not None:
            return "All of it is computed, because prompt_logprobs asks for its log-probabilities."
        return "Nothing is kept: the prefix cache is switched off (--disable-radix-cache)."
    if match.end is MatchEnd.DIFFERS:
        known = "with other tokens" if other is None else f"with {other!r}"
        return f"What is known goes on {known} from position {match.num_tokens} on."
    return SENTENCES[match.end]


def _message(index: int, message: dict[str, Any], own: Range | None, pictures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A message's tokens: from the first of its text or its pictures to the last."""
    ranges = [Range(p["start"], p["start"] + p["tokens"]) for p in pictures if p["message"] == index]
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    if own is not None:
        ranges.append(own)
    elif not ranges or any(text.strip() for text in texts):
        return {"index": index, "role": message["role"], "start": None, "tokens": None, "matched": None}
    start, end = min(one.start for one in ranges), max(one.end for one in ranges)
    return {"index": index, "role": message["role"], "start": start, "tokens": end - start, "matched": 0}


def _pictures(messages: Sequence[dict[str, Any]], pictures: Sequence[Prepared], prompt: Prompt) -> list[dict[str, Any]]:
    """Where the pictures of messages stand, in their order there."""
    places = [
        index
        for index, message in enumerate(messages)
        if isinstance(message["content"], list)
        for part in message["content"]
        if is_picture(part)
    ]
    left, shown = list(prompt.media), []
    for index, (message, prepared) in enumerate(zip(places, pictures, strict=True)):
        media = next(one for one in left if one.key == prepared.key)
        left.remove(media)
        start, end = media.spans[0].start, media.spans[-1].end
        shown.append(
            {"index": index, "message": message, "kind": media.kind, "start": start, "tokens": end - start, "matched": 0}
        )
    return shown


def _checked(node: int) -> int:
    if not 0 <= node <= MAX_NODE_ID:
        raise InvalidRequest(f"node is {node}; GET /cache/tree shows the numbers of nodes", param="node")
    return node


def _counts(pins: PinSummary) -> dict[str, int]:
    return {
        "num_pins": pins.num_pins,
        "pinned_tokens": pins.pinned_tokens,
        "max_pinned_tokens": pins.max_pinned_tokens,
        "pins_given_up": pins.num_given_up,
    }


def _shown(node: NodeSummary, text: str | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": node.id,
        "parent": node.parent,
        "num_tokens": node.num_tokens,
        "end": node.end,
        "num_pages": node.num_pages,
        "requests": node.num_requests,
        "is_pinned": node.is_pinned,
        "pins": node.num_pins,
        "hits": node.hits,
        "age_s": round(node.age_s, 3),
        "num_children": node.num_children,
        "is_salted": node.is_salted,
    }
    return shown if text is None else {**shown, "preview": text}


def preview(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Their text; of a picture that there is one."""
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    runs = groupby(token_ids, lambda id: id >= MEDIA_BASE)
    return "".join(["[picture]" if is_picture else decode(list(run)) for is_picture, run in runs])
