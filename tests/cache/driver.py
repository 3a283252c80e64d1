"""A scheduler without sense and a device that keeps books: drives KVCache like an engine with one step in flight.

Owns running requests and the contents of every page. A cell of memory says for which whole prefix it was computed, so
reading a page that holds the right token after the wrong beginning is noticed. Steps execute strictly in order, one
behind the planning: copies first, then rows; a row reads everything before it and writes its own positions. What a row
reads is compared with what it must find, for rows of requests that were closed in the meantime as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from streamserve.cache.kv_cache import KVCache, Lease
from streamserve.cache.radix import Node
from streamserve.messages import MatchEnd


class Prefixes:
    """Numbers whole prefixes: equal numbers mean equal salt and equal tokens from the first on. 0 is nothing."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, int], int] = {}

    def of(self, salt: str, tokens: Sequence[int]) -> list[int]:
        """One number per position: of the prefix that ends with it."""
        numbers, above = [], (salt, -1)
        for token in tokens:
            number = self._numbers.setdefault((above, token), len(self._numbers) + 1)
            numbers.append(number)
            above = number  # type: ignore[assignment]
        return numbers


@dataclass(eq=False)
class Running:
    """One request: `tokens` it has or will sample, of which `planned` are in steps and `computed` have landed."""

    salt: str
    tokens: list[int]
    prefixes: list[int]
    lease: Lease
    planned: int
    computed: int
    is_open: bool = True


@dataclass(frozen=True)
class Row:
    running: Running
    start: int
    end: int
    pages: tuple[int, ...]
    prefixes: tuple[int, ...]


@dataclass
class Step:
    copies: list[tuple[int, int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Driver:
    """Random or scripted requests against one cache. Every method leaves all invariants checked."""

    def __init__(self, num_pages: int, page_size: int, *, reuse: bool = True) -> None:
        self.cache = KVCache(num_pages, page_size, reuse=reuse, now=lambda: 0.0)
        self.page_size = page_size
        self.running: list[Running] = []
        self.num_refused = 0
        self.num_copies = 0
        self.num_found = 0
        self._prefixes = Prefixes()
        self._ever_committed: set[int] = set()
        self._memory: dict[tuple[int, int], int] = {}
        self._copies: list[tuple[int, int]] = []  # of leases opened since the last step
        self._flight: Step | None = None
        self._pinned: dict[int, tuple[str, list[int]]] = {}  # by number: what is to stay, oldest first
        self._names: dict[int, tuple[str, list[int]]] = {}  # by number: the prefix that a node had when it was last looked at
        self.num_pins_refused = 0
        self.num_pinned = 0
        self.num_node_evictions = 0

    # ---- operations --------------------------------------------------------------------------------------------

    def open(self, salt: str, tokens: Sequence[int], limit: int | None = None) -> Running | None:
        """Admit a request as the engine does, with room for its prompt; None when there is none."""
        limit = len(tokens) - 1 if limit is None else limit
        numbers = self._prefixes.of(salt, tokens)
        expected = self._longest(numbers[: max(0, limit)], self._in_tree())
        needed = self.cache.pages_needed(salt, tokens, limit, len(tokens))
        before = self._everything()
        assert self.cache.match_len(salt, tokens, limit) == expected
        assert self._everything() == before, "asking has changed something"
        available = self.cache.num_available_pages
        lease = self.cache.open(salt, tokens, limit)
        if lease is None:
            self.num_refused += 1
            assert needed > available, "a lease was refused although there is room"
            assert self._everything() == before, "a refused lease has changed something"
            return None
        assert lease.num_cached == expected <= self._longest(numbers, self._ever_committed)
        assert len(lease.pages) == -(-expected // self.page_size)
        assert (lease.copy is not None) == (expected % self.page_size != 0)
        self._check_found(lease, numbers)
        self.cache.check()
        has_room = self.cache.grow(lease, len(tokens))
        assert has_room == (needed <= available), f"{needed} pages needed, {available} available, granted: {has_room}"
        if not has_room:
            self.num_refused += 1
            self.cache.close(lease, ())
            self._check()
            return None
        self.num_found += lease.num_cached
        running = Running(salt, list(tokens), numbers, lease, lease.num_cached, lease.num_cached)
        if lease.copy is not None:
            self.num_copies += 1
            self._copies.append(lease.copy)
        self.running.append(running)
        self._check()
        return running

    def sample(self, running: Running, token: int) -> bool:
        """The request's next token is known to the device, and there is a place to compute it; False without pages."""
        before = self._everything()
        if not self.cache.grow(running.lease, len(running.tokens) + 1):
            assert self._available() == 0 and self._everything() == before
            self.num_refused += 1
            return False
        running.tokens.append(token)
        running.prefixes = self._prefixes.of(running.salt, running.tokens)
        return True

    def step(self, chunks: dict[Running, int], committing: set[Running]) -> None:
        """Launch a step with so many tokens per request, then land the one before and commit some of its requests."""
        step = Step(self._copies)
        self._copies = []
        for running, num_tokens in chunks.items():
            start, end = running.planned, min(running.planned + num_tokens, len(running.tokens))
            if start < end:
                running.planned = end
                step.rows.append(Row(running, start, end, tuple(running.lease.pages), tuple(running.prefixes[:end])))
                self._check_writer(step.rows[-1])
        self.land(committing)
        self._flight = step

    def land(self, committing: set[Running]) -> None:
        """Execute the step that is in flight and take in what it brought."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        for src, dst in flight.copies:
            for offset in range(self.page_size):
                self._memory[dst, offset] = self._memory.get((src, offset), 0)
        for row in flight.rows:
            self._execute(row)
        for row in flight.rows:
            if row.running.is_open:
                row.running.computed = row.end
                if row.running in committing:
                    self.commit(row.running)
        self._check()

    def commit(self, running: Running) -> None:
        self.cache.commit(running.lease, running.tokens[: running.computed])
        self._note_committed(running, running.computed)
        self._check()

    def close(self, running: Running, *, keep: bool) -> None:
        """The request ends or is preempted, perhaps with a row in flight; without `keep` it commits nothing more."""
        self.cache.close(running.lease, running.tokens[: running.computed] if keep else ())
        self._note_committed(running, running.computed if keep else 0)
        running.is_open = False
        self.running.remove(running)
        self._check()

    def flush(self) -> None:
        """Pinned prefixes stay."""
        evictable, free = self.cache.num_evictable_pages, self.cache.num_free_pages
        assert self.cache.flush() == evictable
        assert self.cache.num_free_pages == free + evictable and self.cache.num_evictable_pages == 0
        self._ever_committed &= self._in_tree()
        self._check()

    def pin(self, random: Random) -> None:
        """Pin some node, which must be possible just when the pages of its path are not too many."""
        node = self._some_node(random)
        if node is None:
            return
        held = {page for id in self._pinned for page in self._path_pages(self._node(id))}
        fits = len(held | self._path_pages(node)) <= self.cache.num_pages // 2
        before = self._everything()
        assert self.cache.pin(node.id) == (fits or node.id in self._pinned)
        if not fits or node.id in self._pinned:
            self.num_pins_refused += 1
            assert self._everything() == before
            return
        self.num_pinned += 1
        self._pinned[node.id] = (node.salt, self._tokens_to(node))
        assert self.cache.pin_summary().pinned_tokens == len(held | self._path_pages(node)) * self.page_size
        self._check_names()

    def unpin(self, random: Random) -> None:
        if self._pinned and random.random() < 0.7:
            id = random.choice(list(self._pinned))
            del self._pinned[id]
            self.cache.unpin(id)
        elif self._pinned:
            assert self.cache.give_up_pin()
            del self._pinned[next(iter(self._pinned))]
        else:
            assert not self.cache.give_up_pin()
        self._check_names()

    def evict(self, random: Random) -> None:
        """Forget a part of the tree that nobody holds."""
        node = self._some_node(random)
        if node is None:
            return
        subtree = [n for n in self.cache._tree.nodes() if node in n.path()]
        requests = sum(running.lease.node in subtree for running in self.running)
        pins = sum(self._node(id) in subtree for id in self._pinned)
        assert self.cache.holders_of(node.id) == (requests, pins)
        if requests or pins:
            return
        self.num_node_evictions += 1
        parent, start, tokens = node.parent, node.start, self._tokens_to(node)
        assert parent is not None
        salt, num_free = node.salt, self.cache.num_free_pages
        num_nodes, num_pages = self.cache.evict(node.id)
        assert num_nodes == len(subtree) and self.cache.num_free_pages == num_free + num_pages
        assert not any(self.cache.has_node(n.id) for n in subtree)
        self._ever_committed &= self._in_tree()
        match = self.cache.look_up(salt, tokens, len(tokens), looks_elsewhere=False)
        assert (match.num_tokens, match.end) == (start, MatchEnd.EVICTED)
        assert match.path == tuple(part.id for part in parent.path())
        self._check_names()

    def look(self, random: Random) -> None:
        """Walk a part of the tree, and look a prompt up: nothing changes, and the slow way finds the same."""
        before = self._everything()
        node = self._some_node(random) if random.random() < 0.5 else None
        depth, limit = random.randint(1, 4), random.randint(1, 12)
        found = self.cache.nodes(0 if node is None else node.id, depth, limit, 3)
        assert found is not None
        nodes, is_cut = found
        expected = self._levels(self.cache._tree.root if node is None else node, depth)
        expected = expected if node is None else [node, *expected]
        assert [summary.id for summary in nodes] == [n.id for n in expected[:limit]]
        assert is_cut == (len(expected) > limit)
        for summary, n in zip(nodes, expected, strict=False):
            assert summary.num_requests == sum(n in running.lease.node.path() for running in self.running)
            assert summary.num_pins == sum(n in self._node(id).path() for id in self._pinned)
            assert summary.is_pinned == (n.id in self._pinned) and summary.is_salted == (n.salt != "")
            assert (summary.end, summary.num_children) == (n.end, len(n.children))
            assert summary.first_token_ids == tuple(n.tokens[:3])
        tokens = [*self.known_beginning(random), *(random.randrange(3) for _ in range(random.randrange(4)))] or [0]
        match = self.cache.look_up("", tokens, len(tokens), looks_elsewhere=True)
        longest = self._longest(self._prefixes.of("", tokens), self._in_tree())
        elsewhere = self._longest(self._prefixes.of("other", tokens), self._in_tree())
        if self.cache.reuse:
            assert match.num_tokens == longest
            assert (match.end is MatchEnd.COMPLETE) == (longest == len(tokens))
            assert (match.end is MatchEnd.OTHER_SALT) == (longest < len(tokens) and elsewhere > longest)
            if match.other is not None:
                assert match.end is MatchEnd.DIFFERS and match.other != tokens[longest]
                assert self._prefixes.of("", [*tokens[:longest], match.other])[-1] in self._in_tree()
        assert self._everything() == before, "looking has changed something"

    def finish(self) -> None:
        """Land and close everything; afterwards every page must be free or evictable, and free after a flush."""
        self.step({}, set())
        self.land(set())
        for running in list(self.running):
            self.close(running, keep=True)
        for id in list(self._pinned):
            del self._pinned[id]
            self.cache.unpin(id)
        assert self.cache.num_available_pages == self.cache.num_pages and self.cache.pin_summary().num_pins == 0
        self.flush()
        assert self.cache.num_free_pages == self.cache.num_pages
        assert self.cache.summary(5).num_nodes == 0

    def random_operation(self, random: Random, *, vocab_size: int, max_len: int) -> None:
        """One operation, likely to meet a neighbour's prefix."""
        choice = random.random()
        if choice < 0.25 or not self.running:
            tokens = self.known_beginning(random) + [random.randrange(vocab_size) for _ in range(random.randrange(max_len // 4))]
            tokens = tokens[:max_len] or [0]
            limit = len(tokens) - 1 if random.random() < 0.9 else random.randrange(-1, len(tokens) + 3)
            self.open(random.choice(("", "", "other")), tokens, limit)
        elif choice < 0.70:
            for running in random.sample(self.running, random.randint(0, len(self.running))):
                wants_one = running.is_open and running.planned == len(running.tokens) < max_len
                if wants_one and not self.sample(running, random.randrange(vocab_size)):
                    self.close(random.choice(self.running), keep=True)  # preempted: somebody, perhaps the asker
            rows = random.sample(self.running, random.randint(0, len(self.running)))
            committing = set(random.sample(self.running, random.randint(0, len(self.running))))
            self.step({running: random.randint(1, max_len // 2) for running in rows}, committing)
        elif choice < 0.78:
            self.commit(random.choice(self.running))
        elif choice < 0.93:
            self.close(random.choice(self.running), keep=random.random() < 0.8)
        elif choice < 0.94:
            self.pin(random)
        elif choice < 0.947:
            self.unpin(random)
        elif choice < 0.962:
            self.evict(random)
        elif choice < 0.97:
            self.look(random)
        elif choice < 0.98:
            self.flush()
        else:
            self.land(set(self.running))

    def known_beginning(self, random: Random) -> list[int]:
        """A beginning of something that ran lately, cut anywhere."""
        if not self.running or random.random() < 0.1:
            return [0] * random.randrange(40)
        tokens = random.choice(self.running).tokens
        return tokens[: random.randint(0, len(tokens))]

    def check_everything_is_found(self) -> None:
        """For a cache that has never been short of pages: what was committed since the last flush is there."""
        assert self._in_tree() == self._ever_committed

    # ---- the device --------------------------------------------------------------------------------------------

    def _execute(self, row: Row) -> None:
        for position in range(row.start):
            self._expect(row.pages, position, row.prefixes[position])
        for position in range(row.start, row.end):
            self._memory[row.pages[position // self.page_size], position % self.page_size] = row.prefixes[position]

    def _expect(self, pages: Sequence[int], position: int, prefix: int) -> None:
        found = self._memory.get((pages[position // self.page_size], position % self.page_size), 0)
        assert found == prefix, f"position {position} on page {pages[position // self.page_size]} holds another prefix"

    # ---- what must hold ----------------------------------------------------------------------------------------

    def _check_found(self, lease: Lease, prefixes: Sequence[int]) -> None:
        """What was found is in memory now, before anything else runs: on the lease's pages, or on the one to be copied."""
        pages = list(lease.pages)
        if lease.copy is not None:
            src, dst = lease.copy
            assert pages[-1] == dst and src != dst
            pages[-1] = src
        for position in range(lease.num_cached):
            self._expect(pages, position, prefixes[position])

    def _check_writer(self, row: Row) -> None:
        written = set(row.pages[row.start // self.page_size : -(-row.end // self.page_size)])
        for other in self.running:
            if other is not row.running:
                assert not written & set(other.lease.pages), "a request writes on a page that another one uses"

    def _check(self) -> None:
        self.cache.check()
        assert self.cache.num_available_pages == self._available()
        for running in self.running:
            if running.computed > running.lease.num_cached:  # its copy has been run
                for position in range(running.computed):
                    self._expect(running.lease.pages, position, running.prefixes[position])
            found = running.lease.num_cached
            assert self.cache.match_len(running.salt, running.tokens, found) == (found if self.cache.reuse else 0)

        for salt, tokens in self._pinned.values():
            assert self.cache.match_len(salt, tokens, len(tokens)) == len(tokens), "what was pinned is gone"

    def _check_names(self) -> None:
        """A number names one prefix as long as it lives: one that grows at its end while it is computed, or is cut there."""
        self._check()
        names = {n.id: (n.salt, self._tokens_to(n)) for n in self.cache._tree.nodes()}
        for id in names.keys() & self._names.keys():
            (salt, now), (old_salt, before) = names[id], self._names[id]
            both = min(len(now), len(before))
            assert salt == old_salt and now[:both] == before[:both], "a number names another prefix than it did"
        self._names = names

    def _some_node(self, random: Random) -> Node | None:
        nodes = list(self.cache._tree.nodes())
        return random.choice(nodes) if nodes else None

    def _node(self, id: int) -> Node:
        node = self.cache._tree.find(id)
        assert node is not None, "a pinned node is gone"
        return node

    @staticmethod
    def _tokens_to(node: Node) -> list[int]:
        return [token for part in node.path() for token in part.tokens]

    @staticmethod
    def _path_pages(node: Node) -> set[int]:
        return {page for part in node.path() for page in part.pages}

    @staticmethod
    def _levels(node: Node, depth: int) -> list[Node]:
        found: list[Node] = []
        level = [node]
        for _ in range(depth):
            level = [child for above in level for child in reversed(above.children.values())]
            found += level
        return found

    def _available(self) -> int:
        """Pages that no running request and no pin needs, counted the slow way."""
        held = {page for running in self.running for page in running.lease.pages}
        for running in self.running:
            held.update(page for node in running.lease.node.path() for page in node.pages)
        for id in self._pinned:
            held |= self._path_pages(self._node(id))
        return self.cache.num_pages - len(held)

    def _in_tree(self) -> set[int]:
        """Every prefix in the tree, spelled out."""
        found = set()
        for node in self.cache._tree.nodes():
            path = node.path()
            salt = path[0].edge[0]  # type: ignore[index]
            found.update(self._prefixes.of(salt, [token for part in path for token in part.tokens]))
        return found

    def _longest(self, prefixes: Sequence[int], known: set[int]) -> int:
        length = 0
        while length < len(prefixes) and prefixes[length] in known:
            length += 1
        return length

    def _note_committed(self, running: Running, num_tokens: int) -> None:
        if self.cache.reuse:
            self._ever_committed.update(running.prefixes[:num_tokens])

    def _everything(self) -> object:
        """The whole state of the cache, to see that an operation has changed nothing."""
        cache = self.cache
        nodes = [
            (n.id, n.start, tuple(n.tokens), tuple(n.pages), n.locks, n.pins, n.hits, n.released_s, id(n.parent))
            for n in cache._tree.nodes()
        ]
        order = [id(node) for node in cache._tree._idle]
        return nodes, order, list(cache._pages._free), [tuple(running.lease.pages) for running in self.running]
