"""A URL's parameters, checked, and the pages of lists that they ask for. Knows no route."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs

from streamserve.api.schema import MAX_NAME_CHARS, show
from streamserve.api.wire import Exchange
from streamserve.errors import InvalidRequest

Query = Mapping[str, list[str]]


def query_of(exchange: Exchange, *names: str) -> Query:
    """The URL's parameters. A name with brackets is how some clients write lists."""
    given = parse_qs(exchange.scope.get("query_string", b"").decode("latin1"), keep_blank_values=True)
    query = {name.removesuffix("[]"): values for name, values in given.items()}
    for name in query:
        if name not in names:
            raise InvalidRequest(f"unknown parameter {show(name)}; allowed is {', '.join(names)}", param=name[:MAX_NAME_CHARS])
    return query


def flag(query: Query, name: str) -> bool:
    """Whether it is true; left out, it is false."""
    return choice(query, name, ("false", "true")) == "true"


def choice(query: Query, name: str, allowed: Sequence[str]) -> str:
    """One of the words that are allowed; left out, the first."""
    value = query[name][-1] if name in query else allowed[0]
    if value not in allowed:
        raise InvalidRequest(f"{name} is {show(value)}; allowed is {', '.join(allowed)}", param=name)
    return value


def number(query: Query, name: str, low: int, high: int | None) -> int | None:
    """A whole number within its range; None where it is left out."""
    if name not in query:
        return None
    value = query[name][-1]
    found = int(value) if value.isascii() and value.isdigit() and len(value) < 16 else -1
    if found < low or (high is not None and found > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} and more"
        raise InvalidRequest(f"{name} is {show(value)}; allowed is {allowed}", param=name)
    return found


def page_of(query: Query, items: Sequence[dict[str, Any]], max_limit: int, limit: int, what: str) -> dict[str, Any]:
    """The page of a list, oldest first, that `limit` (as given here when left out), `order` and `after` ask for. `what` the
    items are."""
    limit = number(query, "limit", 1, max_limit) or limit
    if choice(query, "order", ("desc", "asc")) == "desc":
        items = items[::-1]
    if "after" in query:
        after = query["after"][-1]
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"after is {show(after)}, which is no {what}", param="after")
        items = items[places[0] + 1 :]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": list(page), "first_id": first, "last_id": last, "has_more": len(items) > limit}
