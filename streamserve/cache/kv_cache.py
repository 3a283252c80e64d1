"""The face of the KV cache: a request opens a lease, grows it, commits what it has computed and closes it.

Owns the open leases. Knows nothing of requests, queues or tensors: it deals in tokens, positions and page numbers.

Who may write where (page size 4; a request of 11 tokens, 6 of them found in the tree, 8 committed so far):

    position    0 1 2 3 | 4 5 6 7 | 8 9 10 .
    page          p7    |   p4    |    p9
                 tree   | a copy of the tree's p2 (4 5), then the request's own 6 7; since the commit also in the tree
                                  | the request's own, not yet in the tree

A lease writes only positions it has not committed, and only on pages it took itself. The tree may refer to such a page
for the committed head; whoever matches that head gets a copy of it, so no page has two writers, and what a page
holds for committed positions never changes. A copy is made by a later step than all writes before it: a write of a
step that is still running when its lease is closed goes to a position nobody has matched.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from heapq import nlargest
from itertools import islice
from time import monotonic

from streamserve.cache.keys import pack
from streamserve.cache.pages import Pages
from streamserve.cache.radix import Node, PrefixTree
from streamserve.messages import CacheSummary, MatchEnd, NodeSummary, PinSummary, PrefixMatch, PrefixSummary

_PREVIEW_TOKENS = 16
_MAX_BEGINNINGS, _MAX_SALTS = 4096, 64  # looked at, and tried, to see whether another salt knows a prompt


class Lease:
    """One running request's hold on the cache. Read by its holder, written only by KVCache.

    `pages` is the page table; it grows, and its entries never change. It has `room` for so many positions, `num_cached` of
    which were found in the tree.
    `copy` (source, destination) must be run before the lease's first row; the source stays valid while it is open.
    """

    __slots__ = ("copy", "is_open", "node", "num_cached", "num_shared", "pages", "room", "salt")

    def __init__(self, salt: str, node: Node, pages: list[int], num_cached: int, copy: tuple[int, int] | None, room: int) -> None:
        self.pages = pages
        self.room = room
        self.num_cached = num_cached
        self.copy = copy
        self.salt = salt
        self.node = node  # held; the lease's tokens are in the tree down to its end
        self.num_shared = len(pages) - (copy is not None)  # pages[:num_shared] are the tree's, the others its own
        self.is_open = True


class KVCache:
    """Pages of KV memory, shared between requests by prefix. Not for threads: all calls come from one event loop."""

    def __init__(self, num_pages: int, page_size: int, *, reuse: bool = True, now: Callable[[], float] = monotonic) -> None:
        assert num_pages > 0 and page_size > 0
        self.page_size = page_size
        self.reuse = reuse  # False: nothing is ever found or kept
        self._now = now
        self._pages = Pages(num_pages)
        self._tree = PrefixTree(page_size, self._pages, now)
        self._leases: set[Lease] = set()
        self._pins: dict[Node, None] = {}  # oldest first
        self._pinned_pages: Counter[int] = Counter()  # by how many pins
        self.num_pins_given_up = 0  # for requests that could not run beside them
        self._prompt_tokens_seen = 0
        self._prompt_tokens_hit = 0

    # ---- counts, O(1) ------------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        """All pages."""
        return self._pages.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that hold nothing."""
        return self._pages.num_free

    @property
    def num_evictable_pages(self) -> int:
        """Pages that eviction could free right now."""
        return self._pages.num_evictable

    @property
    def num_available_pages(self) -> int:
        """Pages that leases could get right now: free or evictable."""
        return self._pages.num_free + self._pages.num_evictable

    # ---- one request -------------------------------------------------------------------------------------------

    def match_len(self, salt: str, token_ids: Sequence[int], limit: int) -> int:
        """How many tokens open() would find. Changes nothing, not even what is evicted next."""
        return self._match(salt, token_ids, limit)[1]

    def pages_needed(self, salt: str, token_ids: Sequence[int], limit: int, num_tokens: int) -> int:
        """By how much num_available_pages would fall if a lease were opened and grown to `num_tokens` positions.

        Counts fresh pages and found ones that are evictable until the lease locks them. open() and grow() succeed if
        and only if as many pages are available. Changes nothing.
        """
        node, matched = self._match(salt, token_ids, limit)
        num_fresh = self._num_pages_of(max(num_tokens, matched)) - matched // self.page_size
        return num_fresh + self._tree.num_idle_pages(node, matched)

    def open(self, salt: str, token_ids: Sequence[int], limit: int) -> Lease | None:
        """A lease that holds the longest known prefix of `token_ids[:limit]`.

        When the match ends inside a page, the lease gets a page of its own for a copy of it. None, and no change, if
        that page cannot be had even by evicting.
        """
        node, matched = self._match(salt, token_ids, limit)
        num_full, num_more = divmod(matched, self.page_size)
        if num_more and self._pages.num_free == 0 and self._tree.num_idle_pages(node, matched) >= self._pages.num_evictable:
            return None
        node = self._tree.hold(node, matched, above=self._tree.root)
        for part in node.path():
            part.hits += 1
        pages, copy = self._tree.page_table(node), None
        if num_more:
            copy = (pages[num_full], self._take(1)[0])
            pages[num_full] = copy[1]
        lease = Lease(salt, node, pages, matched, copy, len(pages) * self.page_size)
        self._leases.add(lease)
        return lease

    def grow(self, lease: Lease, num_tokens: int) -> bool:
        """Make the page table cover `num_tokens` positions, evicting as needed. False, and no change, if impossible."""
        assert lease.is_open
        num_missing = -(-num_tokens // self.page_size) - len(lease.pages)
        if num_missing <= 0:
            return True
        if num_missing > self._pages.num_free and num_missing > self.num_available_pages:
            return False
        lease.pages += self._take(num_missing)
        lease.room = len(lease.pages) * self.page_size
        return True

    def commit(self, lease: Lease, token_ids: Sequence[int]) -> None:
        """The lease's tokens `token_ids`, from position 0 on, are computed: others may find them from now on.

        What the tree has already it keeps on its own pages; the rest joins it on the lease's pages. Costs as much as
        the tokens that are not committed yet, so it may follow every chunk of a prompt.
        """
        assert lease.is_open
        num_tokens = len(token_ids)
        if not self.reuse or num_tokens <= lease.node.end:
            return
        assert num_tokens <= len(lease.pages) * self.page_size, (
            f"{num_tokens} tokens do not fit the lease's {len(lease.pages)} pages"
        )
        node, matched = self._tree.match(lease.node, lease.salt, token_ids, num_tokens)
        if matched == num_tokens:
            return  # in the tree already, and free to be evicted: this lease has the same on its own pages
        node = self._tree.hold(node, matched, above=lease.node)
        pages = lease.pages[matched // self.page_size : self._num_pages_of(num_tokens)]  # its own: it found less than that
        lease.node = self._tree.insert(node, lease.salt, pack(token_ids[matched:]), pages)

    def close(self, lease: Lease, token_ids: Sequence[int]) -> None:
        """Commit `token_ids` (none: what is committed stays), then give up every page and lock of the lease."""
        self.commit(lease, token_ids)
        lease.is_open = False
        self._leases.remove(lease)
        self._tree.release(lease.node)
        self._pages.give_up(lease.pages[lease.num_shared :])

    def _match(self, salt: str, token_ids: Sequence[int], limit: int) -> tuple[Node, int]:
        return self._tree.match(self._tree.root, salt, token_ids, min(limit, len(token_ids)))

    def _take(self, num_pages: int) -> list[int]:
        shortage = num_pages - self._pages.num_free
        if shortage > 0:
            self._tree.evict(shortage)
        return self._pages.take(num_pages)

    def _num_pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    # ---- the whole ---------------------------------------------------------------------------------------------

    def flush(self) -> int:
        """Forget every prefix that no lease and no pin holds. Returns the number of pages freed."""
        return self._tree.evict(self.num_pages + 1)

    def note_prompt(self, num_tokens: int, num_cached: int) -> None:
        """For statistics: a prompt of `num_tokens` was admitted, `num_cached` of them were found. Once per request."""
        assert 0 <= num_cached <= num_tokens
        self._prompt_tokens_seen += num_tokens
        self._prompt_tokens_hit += num_cached

    def summary(self, max_prefixes: int) -> CacheSummary:
        """The tree as an operator sees it, with the prefixes that were found most often."""
        return CacheSummary(
            num_nodes=self._tree.num_nodes,
            cached_tokens=self._tree.num_tokens,
            evictable_tokens=self.num_evictable_pages * self.page_size,
            free_tokens=self.num_free_pages * self.page_size,
            total_tokens=self.num_pages * self.page_size,
            prompt_tokens_seen=self._prompt_tokens_seen,
            prompt_tokens_hit=self._prompt_tokens_hit,
            top_prefixes=self._top_prefixes(max_prefixes),
            pins=self.pin_summary(),
        )

    def _top_prefixes(self, max_prefixes: int) -> tuple[PrefixSummary, ...]:
        """Most hits first, then longest. A prefix stands for its own beginnings that were found as often."""
        nodes = (node for node in self._tree.nodes() if all(child.hits < node.hits for child in node.children.values()))
        best = nlargest(max_prefixes, nodes, key=lambda node: (node.hits, node.end))
        now_s = self._now()
        return tuple(
            PrefixSummary(
                num_tokens=node.end,
                num_requests=node.locks - node.pins,
                hits=node.hits,
                age_s=_age_s(node, now_s),
                first_token_ids=_first_token_ids(node),
            )
            for node in best
        )

    @property
    def hits(self) -> tuple[int, int]:
        """Prompt tokens since the start, and those of them that were found."""
        return self._prompt_tokens_seen, self._prompt_tokens_hit

    # ---- for those who look --------------------------------------------------------------------------------------

    def nodes(self, node_id: int, depth: int, limit: int, num_first: int) -> tuple[tuple[NodeSummary, ...], bool] | None:
        """So many levels below a node (0: the root), behind the node itself if it is not the root; at most `limit` nodes. And
        whether that left any out. With the first `num_first` tokens of each. None: there is no such node."""
        node = self._tree.find(node_id)
        if node is None:
            return None
        own = [] if node is self._tree.root else [node]
        found, is_cut = self._tree.below(node, depth, limit - len(own))
        return self._summaries([*own, *found], num_first), is_cut

    def pinned_nodes(self, num_first: int) -> tuple[NodeSummary, ...]:
        """Those with a pin, the oldest first."""
        return self._summaries(self._pins, num_first)

    def _summaries(self, nodes: Iterable[Node], num_first: int) -> tuple[NodeSummary, ...]:
        now_s, salted = self._now(), dict[Node | None, bool]()
        summaries = []
        for node in nodes:  # parents before their children: salts are looked for once
            known = salted.get(node.parent)
            salted[node] = node.salt != "" if known is None else known
            summaries.append(self._summary_of(node, now_s, num_first, salted[node]))
        return tuple(summaries)

    def _summary_of(self, node: Node, now_s: float, num_first: int, is_salted: bool) -> NodeSummary:
        assert node.parent is not None
        return NodeSummary(
            id=node.id,
            parent=node.parent.id,
            num_tokens=len(node.tokens),
            end=node.end,
            num_pages=len(node.pages),
            num_requests=node.locks - node.pins,
            num_pins=node.pins,
            is_pinned=node in self._pins,
            hits=node.hits,
            age_s=_age_s(node, now_s),
            num_children=len(node.children),
            is_salted=is_salted,
            first_token_ids=tuple(node.tokens[:num_first]),
        )

    def look_up(self, salt: str, token_ids: Sequence[int], limit: int, *, looks_elsewhere: bool) -> PrefixMatch:
        """What open() would find, and why no more. Changes nothing. `looks_elsewhere`: see whether another salt knows more."""
        limit = max(0, min(limit, len(token_ids)))
        if not self.reuse:
            return PrefixMatch(0, (), MatchEnd.OFF)
        node, matched = self._match(salt, token_ids, limit)
        path = tuple([part.id for part in node.path()])
        if matched >= limit:
            return PrefixMatch(matched, path, MatchEnd.COMPLETE)
        if looks_elsewhere:
            for other in islice(self._tree.elsewhere(salt, token_ids[0], _MAX_BEGINNINGS), _MAX_SALTS):
                if self._match(other, token_ids, limit)[1] > matched:
                    return PrefixMatch(matched, path, MatchEnd.OTHER_SALT)
        if matched < node.end:
            return PrefixMatch(matched, path, MatchEnd.DIFFERS, node.tokens[matched - node.start])
        if self._tree.was_evicted(node, salt, matched, token_ids[matched]):
            return PrefixMatch(matched, path, MatchEnd.EVICTED)
        if node.children and node is not self._tree.root:
            child = next(iter(node.children.values())) if len(node.children) == 1 else None
            return PrefixMatch(matched, path, MatchEnd.DIFFERS, child.tokens[0] if child is not None else None)
        return PrefixMatch(matched, path, MatchEnd.NEW)

    # ---- pins ----------------------------------------------------------------------------------------------------

    def pin_summary(self) -> PinSummary:
        """How much of the memory pins hold, and how much they may: half of it."""
        size = self.page_size
        return PinSummary(len(self._pins), len(self._pinned_pages) * size, self.num_pages // 2 * size, self.num_pins_given_up)

    def has_node(self, node_id: int) -> bool:
        """Whether there is a node of that number. The root is none."""
        return node_id != self._tree.root.id and self._tree.find(node_id) is not None

    def pin(self, node_id: int) -> bool:
        """Keep the path down to a node from being evicted. False, and no change, if pins would hold more than half of all pages.
        A pinned node stays so."""
        node = self._node(node_id)
        if node in self._pins:
            return True
        pages = _pages_of(node)
        num_new = sum(page not in self._pinned_pages for page in pages)
        if len(self._pinned_pages) + num_new > self.num_pages // 2:
            return False
        self._tree.pin(node)
        self._pins[node] = None
        self._pinned_pages.update(pages)
        return True

    def unpin(self, node_id: int) -> None:
        """Let go of a node, if it is pinned: it may be evicted from now on, as if it had just been used."""
        node = self._node(node_id)
        if node in self._pins:
            self._unpin(node)

    def give_up_pin(self) -> bool:
        """Let go of the oldest pin, for a request that cannot run beside it. False: there is none."""
        node = next(iter(self._pins), None)
        if node is None:
            return False
        self._unpin(node)
        self.num_pins_given_up += 1
        return True

    def _unpin(self, node: Node) -> None:
        del self._pins[node]
        for page in _pages_of(node):  # the same as when it was pinned: what is held only ever splits
            self._pinned_pages[page] -= 1
            if not self._pinned_pages[page]:
                del self._pinned_pages[page]
        self._tree.unpin(node)

    def holders_of(self, node_id: int) -> tuple[int, int]:
        """How many running requests, and how many pins, stand on a node or below it."""
        node = self._node(node_id)
        return node.locks - node.pins, node.pins

    def evict(self, node_id: int) -> tuple[int, int]:
        """Forget a node that nobody holds, and all below it. Returns how many nodes and how many pages that freed."""
        num_free = self._pages.num_free
        num_nodes = self._tree.evict_from(self._node(node_id))
        return num_nodes, self._pages.num_free - num_free

    def _node(self, node_id: int) -> Node:
        node = self._tree.find(node_id)
        assert node is not None and node is not self._tree.root
        return node

    def check(self) -> None:
        """Assert that all books agree: no page lost, none with two owners, every count right. For tests and idle times."""
        refs, pins = self._tree.check(Counter(lease.node for lease in self._leases), Counter(self._pins.keys()))
        assert self._pinned_pages == Counter(page for node in self._pins for page in _pages_of(node)), "pins are miscounted"
        assert len(self._pinned_pages) <= self.num_pages // 2, "pins hold more than half"
        owner: dict[int, Lease] = {}
        for lease in self._leases:
            found = self._tree.page_table(lease.node)[: lease.num_shared]
            assert lease.pages[: lease.num_shared] == found, "the tree has moved pages that a lease found"
            own = lease.pages[lease.num_shared :]
            assert not owner.keys() & set(own) and len(set(own)) == len(own), "a page has two owners"
            owner.update(dict.fromkeys(own, lease))
            refs.update(own)
            pins.update(own)
        for node in self._tree.nodes():
            for page in node.pages:
                assert page not in owner or node.end <= owner[page].node.end, "the tree has positions not yet committed"
        self._pages.check(refs, pins)


def _age_s(node: Node, now_s: float) -> float:
    return 0.0 if node.locks > node.pins else max(0.0, now_s - node.released_s)


def _pages_of(node: Node) -> set[int]:
    """What holding the path down to a node holds."""
    return {page for part in node.path() for page in part.pages}


def _first_token_ids(node: Node) -> tuple[int, ...]:
    tokens: list[int] = []
    for part in node.path():
        tokens.extend(part.tokens[: _PREVIEW_TOKENS - len(tokens)])
        if len(tokens) == _PREVIEW_TOKENS:
            break
    return tuple(tokens)
