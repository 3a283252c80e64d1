"""Prefix tree over pages: which computed tokens can be found again, and on which pages they are.

Owns the nodes, their locks and their references to pages. Knows nothing of requests or tensors.

A node covers the positions [start, end) below its parent and refers to the pages floor(start/S) … ceil(end/S) - 1 of its
path. A node that starts inside a page refers to a page that holds the earlier positions of that page, too: the very
page of its parent when a node was split there, or the copy that a request made and wrote on. So the page for an index
is the one of the deepest node that has it:

    page size 4        positions  0 1 2 3 | 4 5 6 7 | 8 9 . .
    root ── A [0, 6)                 p0   |  p1: 4 5
             ├── B [6, 10)                |  p1: 4 5 6 7 | p2: 8 9       the request that wrote A went on in p1
             └── C [6, 7)                 |  p3: 4 5 6                   another one copied 4 5 to p3 and wrote its own 6

A node is locked as often as running requests, and pins, stand on it or below it. Nodes without a lock are idle: they can be
evicted, from the leaves upwards, oldest first.

A node has a number of its own while it lives: it names the prefix that ends with the node. The lower half of a node that is
split keeps it, with its children, its holders and its pin; the upper half is new.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count, islice
from typing import Optional

from streamserve.cache.evict import LeastRecentlyUsed
from streamserve.cache.forgotten import Forgotten
from streamserve.cache.keys import Packed, common_len, edge, pack
from streamserve.cache.pages import Pages


class Node:
    """A run of tokens in the tree. Read by everybody, written only by PrefixTree."""

    __slots__ = ("children", "edge", "hits", "id", "locks", "pages", "parent", "pins", "released_s", "start", "tokens")

    def __init__(self, id: int, parent: Optional["Node"], edge: Hashable, start: int, tokens: Packed, pages: list[int]) -> None:
        self.id = id
        self.parent = parent
        self.edge = edge  # its key among the parent's children
        self.start = start
        self.tokens = tokens
        self.pages = pages
        self.children: dict[Hashable, Node] = {}
        self.locks = 0
        self.pins = 0  # of the locks those that no request has
        self.hits = 0  # opens that matched into it
        self.released_s = 0.0  # when a request let go of it last

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def salt(self) -> str:
        """Its namespace."""
        node = self
        while node.start:
            assert node.parent is not None
            node = node.parent
        namespace = node.edge[0] if isinstance(node.edge, tuple) else ""
        assert isinstance(namespace, str)
        return namespace

    def path(self) -> list["Node"]:
        """From the first node below the root down to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class PrefixTree:
    """All computed prefixes of all namespaces. Takes part in the page accounting of `pages`."""

    def __init__(self, page_size: int, pages: Pages, now: Callable[[], float]) -> None:
        self._ids = count()
        self.root = Node(next(self._ids), None, None, 0, pack(()), [])  # empty; never locked, idle or evicted
        self._by_id = {self.root.id: self.root}
        self._forgotten = Forgotten()
        self.num_nodes = 0
        self.num_tokens = 0
        self._page_size = page_size
        self._pages = pages
        self._now = now
        self._idle: LeastRecentlyUsed[Node] = LeastRecentlyUsed()

    # ---- looking -----------------------------------------------------------------------------------------------

    def match(self, below: Node, namespace: str, token_ids: Sequence[int], limit: int) -> tuple[Node, int]:
        """Follow `token_ids[:limit]` from the end of `below`, whose own tokens are taken to agree.

        Returns the deepest node that agrees in at least one token (or `below`) and the number of tokens that agree,
        which may be a place inside that node. Changes nothing.
        """
        node, position = below, below.end
        while position < limit:
            child = node.children.get(edge(namespace, position, token_ids[position]))
            if child is None:
                break
            node = child
            position += common_len(child.tokens, token_ids, position, limit)
            if position < child.end:
                break
        return node, position

    def num_idle_pages(self, node: Node, position: int) -> int:
        """How many evictable pages would no longer be evictable if the path down to `position` in `node` were held."""
        if node.locks or node is self.root:
            return 0  # what is held is pinned, all the way up
        table = set(node.pages[: self._num_pages_to(node, position)])
        while (above := node.parent) is not None and not above.locks:
            table.update(above.pages)
            node = above
        return sum(1 for page in table if not self._pages.is_pinned(page))

    def page_table(self, node: Node) -> list[int]:
        """Pages of the path down to the end of `node`, by index."""
        table: list[int] = []
        for part in node.path():
            table[part.start // self._page_size :] = part.pages
        return table

    def find(self, id: int) -> Node | None:
        """The node of that number, if it lives."""
        return self._by_id.get(id)

    def below(self, node: Node, depth: int, limit: int) -> tuple[list[Node], bool]:
        """Nodes of so many levels below a node, at most `limit`: level by level, of a node's children the newest first. And
        whether the limit left out any. Looks at no more nodes than it returns."""
        found: list[Node] = []
        waiting = deque([(node, depth)])
        while waiting:
            above, levels = waiting.popleft()
            for child in reversed(above.children.values()):
                if len(found) == limit:
                    return found, True
                found.append(child)
                if levels > 1 and child.children:
                    waiting.append((child, levels - 1))
        return found, False

    def was_evicted(self, node: Node, namespace: str, position: int, token: int) -> bool:
        """Whether something that began with this token stood behind `position`, at the end of `node`, and was evicted lately."""
        return (node.id, position, edge(namespace, position, token)) in self._forgotten

    def elsewhere(self, namespace: str, token: int, most: int) -> Iterator[str]:
        """Other namespaces in which a prompt begins with this token, found among the newest `most` beginnings."""
        for key in islice(reversed(self.root.children), most):
            assert isinstance(key, tuple)
            if key[1] == token and key[0] != namespace:
                yield key[0]

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents first."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    # ---- holding -----------------------------------------------------------------------------------------------

    def hold(self, node: Node, position: int, above: Node) -> Node:
        """Lock the path from below `above` down to `position` in `node`, once. Returns the node that ends there.

        `position` inside the node splits it, so that what lies behind stays evictable. `above` is the root or held.
        """
        if position < node.end:
            node = self._split(node, position)
        part = node
        while part is not above:
            if part.locks == 0:
                self._idle.remove(part)
                self._pages.pin(part.pages)
            part.locks += 1
            assert part.parent is not None, "the node is not below `above`"
            part = part.parent
        return node

    def release(self, node: Node) -> None:
        """Undo one hold of the whole path down to `node`."""
        now_s = self._now()
        while node.parent is not None:
            assert node.locks > 0, "a node is released more often than held"
            node.locks -= 1
            node.released_s = now_s
            if node.locks == 0:
                self._pages.unpin(node.pages)
                self._idle.add(node)  # after everything below it, as the order needs
            node = node.parent

    def pin(self, node: Node) -> None:
        """Hold the path down to a node for nobody: until it is unpinned."""
        self.hold(node, node.end, above=self.root)
        for part in node.path():
            part.pins += 1

    def unpin(self, node: Node) -> None:
        """Undo one pin. Counts as a use."""
        for part in node.path():
            part.pins -= 1
        self.release(node)

    # ---- growing and shrinking -----------------------------------------------------------------------------------

    def insert(self, parent: Node, namespace: str, tokens: Packed, pages: list[int]) -> Node:
        """Put tokens below `parent`, which the caller holds and below which nothing begins with the same token.

        `pages` cover the tokens from the page on in which they begin, and are pinned by the caller. Both lists become
        the tree's own. Returns the node that ends with the tokens, held once.
        """
        assert tokens, "a node has at least one token"
        self.num_tokens += len(tokens)
        if self._can_extend(parent, pages):
            new = pages[1:] if parent.end % self._page_size else pages
            parent.tokens.extend(tokens)
            parent.pages.extend(new)
            self._pages.add_pinned(new)
            return parent
        key = edge(namespace, parent.end, tokens[0])
        assert key not in parent.children, "the parent has this branch already"
        node = self._new_node(parent, key, parent.end, tokens, pages)
        node.locks = 1
        self._pages.add_pinned(pages)
        parent.children[key] = node
        return node

    def _new_node(self, parent: Node, key: Hashable, start: int, tokens: Packed, pages: list[int]) -> Node:
        node = Node(next(self._ids), parent, key, start, tokens, pages)
        self._by_id[node.id] = node
        self.num_nodes += 1
        return node

    def _can_extend(self, node: Node, pages: list[int]) -> bool:
        """The node is the caller's alone, and its last page is full or goes on: a prompt computed in chunks is one node.

        A node that was matched before stays as it is, since its hits are not the hits of what follows.
        """
        if node.parent is None or node.locks > 1 or node.children or node.hits:
            return False
        return node.end % self._page_size == 0 or node.pages[-1] == pages[0]

    def evict(self, num_pages: int) -> int:
        """Free at least `num_pages` pages if idle nodes have as many, else all they have. Returns how many."""
        freed = 0
        while freed < num_pages and (leaf := self._idle.oldest()) is not None:
            freed += self._shrink(leaf, num_pages - freed)
        return freed

    def evict_from(self, node: Node) -> int:
        """Forget an idle node and all below it. Returns how many nodes that were."""
        nodes = [node]
        for part in nodes:  # grows while it is walked: parents before their children
            assert part.locks == 0
            nodes += part.children.values()
        for part in reversed(nodes):
            self._shrink(part, self._pages.num_pages + 1)
        return len(nodes)

    def _shrink(self, leaf: Node, num_pages: int) -> int:
        """Drop pages from the end of an idle leaf until `num_pages` are free or the leaf is gone."""
        assert not leaf.children and leaf.parent is not None
        freed, old_len = 0, len(leaf.tokens)
        while leaf.pages and freed < num_pages:
            freed += self._pages.drop([leaf.pages.pop()])
        if leaf.pages:
            end = (leaf.start // self._page_size + len(leaf.pages)) * self._page_size
            self._forgotten.add((leaf.id, end, leaf.tokens[end - leaf.start]))
            del leaf.tokens[end - leaf.start :]
            self.num_tokens -= old_len - len(leaf.tokens)
        else:
            self._forgotten.add((leaf.parent.id, leaf.start, leaf.edge))
            del leaf.parent.children[leaf.edge]
            del self._by_id[leaf.id]
            self._idle.remove(leaf)
            self.num_tokens -= old_len
            self.num_nodes -= 1
        return freed

    def _split(self, node: Node, position: int) -> Node:
        """Cut a node in two; the upper half is returned. Both refer to a page that is cut.

        The lower half stays the old object, since holders stand on the ends of nodes. An idle upper half comes last in
        the order of eviction, which is out of place until its path is held: hold() does that at once.
        """
        assert node.start < position < node.end and node.parent is not None
        cut, num_pages = position - node.start, self._num_pages_to(node, position)
        upper = self._new_node(node.parent, node.edge, node.start, node.tokens[:cut], node.pages[:num_pages])
        upper.locks, upper.pins, upper.hits, upper.released_s = node.locks, node.pins, node.hits, node.released_s
        node.parent.children[node.edge] = upper
        if position % self._page_size:
            num_pages -= 1
            if node.locks:
                self._pages.add_pinned([node.pages[num_pages]])
            else:
                self._pages.add_loose(node.pages[num_pages])
        node.tokens, node.pages = node.tokens[cut:], node.pages[num_pages:]
        node.parent, node.start, node.edge = upper, position, node.tokens[0]  # never at position 0: no namespace
        upper.children[node.edge] = node
        if upper.locks == 0:
            self._idle.add(upper)
        return upper

    def _num_pages_to(self, node: Node, position: int) -> int:
        """How many of the node's pages the positions before `position` need."""
        return -(-position // self._page_size) - node.start // self._page_size

    # ---- checking ------------------------------------------------------------------------------------------------

    def check(self, holders: Counter[Node], pinned: Counter[Node]) -> tuple[Counter[int], Counter[int]]:
        """Assert the tree's invariants, given how many requests, and how many pins, stand on each node. Returns its references
        and the pinned ones among them."""
        refs: Counter[int] = Counter()
        pins: Counter[int] = Counter()
        nodes = list(self.nodes())
        locks, num_pins = _at_or_below(holders + pinned), _at_or_below(pinned)
        for node in nodes:
            self._check_node(node)
            assert node.locks == locks[node], f"{node.locks} locks, {locks[node]} holders at or below"
            assert node.pins == num_pins[node], f"{node.pins} pins, {num_pins[node]} at or below"
            refs.update(node.pages)
            if node.locks:
                pins.update(node.pages)
        assert locks.keys() <= set(nodes), "a held node is not in the tree"
        assert self.num_nodes == len(nodes), "nodes are miscounted"
        assert self._by_id == {node.id: node for node in [self.root, *nodes]}, "a node is not found by its number"
        assert self.num_tokens == sum(len(node.tokens) for node in nodes), "tokens are miscounted"
        order = {node: place for place, node in enumerate(self._idle)}
        assert order.keys() == {node for node in nodes if not node.locks}, "the order of eviction is not that of idle nodes"
        assert all(node.parent not in order or order[node] < order[node.parent] for node in order), "a parent would go first"
        return refs, pins

    def _check_node(self, node: Node) -> None:
        assert node.parent is not None and node.parent.children[node.edge] is node
        assert node.tokens and node.start == node.parent.end, "a node does not begin where its parent ends"
        assert len(node.pages) == self._num_pages_to(node, node.end), "a node has not exactly the pages of its positions"
        assert len(set(node.pages)) == len(node.pages), "a node uses a page twice"
        first = node.edge[1] if isinstance(node.edge, tuple) else node.edge
        assert first == node.tokens[0] and isinstance(node.edge, tuple) == (node.start == 0), "a node is filed wrongly"


def _at_or_below(counts: Counter[Node]) -> Counter[Node]:
    """For every node of these paths how many stand on it or below it."""
    sums: Counter[Node] = Counter()
    for node, number in counts.items():
        for part in node.path():
            sums[part] += number
    return sums
