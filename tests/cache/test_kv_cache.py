"""KVCache case by case: what is found, copied, shared, evicted and shown."""

from array import array
from collections.abc import Sequence

import pytest

from streamserve.cache.kv_cache import KVCache, Lease
from tests.cache.driver import Driver, Running

PAGE = 16


class Clock:
    """Wall time in a test's hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def opened(cache: KVCache, tokens: Sequence[int], *, salt: str = "", limit: int | None = None) -> Lease:
    """A lease with room for all tokens, nothing committed."""
    lease = cache.open(salt, tokens, len(tokens) - 1 if limit is None else limit)
    assert lease is not None and cache.grow(lease, len(tokens))
    return lease


def remember(cache: KVCache, tokens: Sequence[int], *, salt: str = "") -> None:
    """A request with these tokens came and went."""
    cache.close(opened(cache, tokens, salt=salt), tokens)
    cache.check()


def computed(driver: Driver, tokens: Sequence[int], *, salt: str = "") -> Running:
    """A running request of the driver whose prompt is computed and committed."""
    running = driver.open(salt, tokens)
    assert running is not None
    driver.step({running: len(tokens)}, set())
    driver.land({running})
    return running


# ---- finding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 100, 1000])
def test_an_exact_repeat_of_n_tokens_finds_n_minus_1(num_tokens: int) -> None:
    cache = KVCache(num_pages=200, page_size=PAGE)
    tokens = [7 * i % 1000 for i in range(num_tokens)]
    remember(cache, tokens)
    for _ in range(3):
        lease = opened(cache, tokens)
        assert lease.num_cached == num_tokens - 1
        assert (lease.copy is None) == ((num_tokens - 1) % PAGE == 0)
        cache.close(lease, tokens)
    assert cache.match_len("", tokens, num_tokens) == num_tokens


def test_a_match_ends_where_two_prompts_part_inside_a_long_node() -> None:
    cache = KVCache(num_pages=200, page_size=PAGE)
    tokens = list(range(2000))
    remember(cache, tokens)
    for same in (1, 63, 64, 65, 319, 320, 321, 1234, 1999):
        other = [*tokens[:same], 5000, *tokens[same + 1 :]]
        assert cache.match_len("", other, 2000) == same
        assert cache.match_len("", tokens, same) == same


def test_two_salts_share_nothing() -> None:
    cache = KVCache(num_pages=20, page_size=PAGE)
    tokens = list(range(40))
    remember(cache, tokens, salt="a")
    assert cache.match_len("b", tokens, 40) == 0
    remember(cache, tokens, salt="b")
    pages_a, pages_b = (set(opened(cache, tokens, salt=salt, limit=32).pages) for salt in ("a", "b"))
    assert not pages_a & pages_b


def test_any_kind_of_token_run_is_taken() -> None:
    cache = KVCache(num_pages=20, page_size=PAGE)
    remember(cache, array("i", range(40)))
    assert cache.match_len("", tuple(range(40)), 40) == 40
    assert cache.match_len("", list(range(40)), 40) == 40
    kept = array("i", range(50))
    remember(cache, kept)
    kept[45] = 9  # the caller's array stays the caller's
    assert cache.match_len("", list(range(50)), 50) == 50


def test_asking_changes_neither_the_tree_nor_what_is_evicted_next() -> None:
    cache = KVCache(num_pages=3, page_size=4)
    for first in (10, 20, 30):
        remember(cache, [first, 1, 2, 3])
    assert cache.match_len("", [10, 1, 9], 3) == 2
    assert cache.pages_needed("", [10, 1, 9], 2, 3) == 2  # the page to copy from, and the copy
    assert cache.summary(9).num_nodes == 3
    remember(cache, [40, 1, 2, 3])
    assert cache.match_len("", [10, 1, 2, 3], 4) == 0


def test_a_chat_of_six_turns_finds_all_earlier_tokens_in_every_turn() -> None:
    driver = Driver(num_pages=100, page_size=PAGE)
    history: list[int] = []
    for turn in range(6):
        prompt = [*history, *range(1000 * turn, 1000 * turn + 11 + turn)]
        running = driver.open("", prompt)
        assert running is not None and running.lease.num_cached == len(history)
        driver.step({running: len(prompt)}, set())
        for token in range(13):  # the last sampled token is never computed
            assert driver.sample(running, 500 + token)
            driver.step({running: 1}, set())
        driver.land(set())
        history = running.tokens[: running.computed]
        assert len(history) == len(prompt) + 13
        driver.close(running, keep=True)
    driver.finish()


def test_nothing_is_found_without_reuse() -> None:
    cache = KVCache(num_pages=10, page_size=PAGE, reuse=False)
    remember(cache, list(range(40)))
    assert cache.match_len("", list(range(40)), 40) == 0
    assert cache.num_free_pages == 10


# ---- splitting, copying, sharing -----------------------------------------------------------------------------------


def test_prompts_that_part_inside_a_page_each_keep_their_own_contents() -> None:
    driver = Driver(num_pages=20, page_size=4)
    first = computed(driver, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    second = computed(driver, [1, 2, 3, 4, 5, 6, 77, 88, 99])
    third = computed(driver, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert second.lease.num_cached == 6 and third.lease.num_cached == 10
    assert second.lease.pages[0] == first.lease.pages[0]  # a full page is shared, a partly matched one copied
    assert second.lease.copy == (first.lease.pages[1], second.lease.pages[1])
    assert third.lease.copy == (first.lease.pages[2], third.lease.pages[2])
    driver.finish()


def test_a_request_goes_on_in_a_page_whose_head_others_have_copied() -> None:
    driver = Driver(num_pages=20, page_size=8)
    writer = computed(driver, [1, 2, 3, 4, 5])
    reader = driver.open("", [1, 2, 3, 4, 5, 60])
    assert reader is not None and reader.lease.copy == (writer.lease.pages[0], reader.lease.pages[0])
    for token in (6, 7, 8, 9):  # the writer fills the page and begins the next while the copy has yet to run
        assert driver.sample(writer, token)
    driver.step({writer: 2, reader: 1}, {writer})
    driver.step({writer: 2}, {writer, reader})
    driver.land({writer})
    assert driver.cache.match_len("", [1, 2, 3, 4, 5, 6, 7, 8, 9], 9) == 9
    assert driver.cache.match_len("", [1, 2, 3, 4, 5, 60], 6) == 6
    driver.finish()


def test_a_write_still_under_way_when_its_request_closes_harms_nobody() -> None:
    driver = Driver(num_pages=3, page_size=4)
    closing = computed(driver, [1, 2, 3, 4, 5])
    assert driver.sample(closing, 6)
    driver.step({closing: 1}, set())  # in flight: writes position 5, in the page whose head is in the tree
    driver.close(closing, keep=True)
    assert driver.cache.match_len("", [1, 2, 3, 4, 5, 6], 6) == 5
    follower = driver.open("", [1, 2, 3, 4, 5, 70])
    assert follower is not None and follower.lease.num_cached == 5
    driver.step({follower: 1}, set())  # launched behind it: copy, then write of another token at position 5
    driver.land({follower})
    driver.finish()


def test_two_requests_that_compute_one_prompt_at_once_keep_one_copy_in_the_tree() -> None:
    cache = KVCache(num_pages=20, page_size=4)
    tokens = list(range(11))
    first, second = opened(cache, tokens), opened(cache, tokens)
    assert first.num_cached == second.num_cached == 0
    for end in (3, 8, 11):
        cache.commit(first, tokens[:end])
        cache.commit(second, tokens[:end])
        cache.check()
    assert cache.summary(0).cached_tokens == 11 and cache.summary(0).num_nodes == 1
    pages = list(second.pages)
    cache.close(first, tokens)
    assert second.pages == pages and cache.num_free_pages == 14
    cache.close(second, [*tokens, 11])  # the page after the common ones is its own
    assert cache.num_free_pages == 16 and cache.match_len("", [*tokens, 11], 12) == 12
    cache.check()


def test_a_request_whose_duplicates_were_evicted_from_the_tree_brings_its_own() -> None:
    cache = KVCache(num_pages=20, page_size=4)
    tokens = list(range(12))
    first, second = opened(cache, tokens), opened(cache, tokens)
    cache.commit(first, tokens)
    cache.commit(second, tokens[:8])
    cache.close(first, tokens)
    assert cache.num_evictable_pages == 3 and cache.flush() == 3  # nobody needs the tree's: the second has its own
    assert cache.match_len("", tokens, 12) == 0
    cache.commit(second, tokens)
    assert cache.match_len("", tokens, 12) == 12
    cache.check()


def test_a_prompt_committed_in_chunks_is_one_node() -> None:
    cache = KVCache(num_pages=100, page_size=PAGE)
    tokens = list(range(1000))
    lease = opened(cache, tokens)
    for end in range(7, 1000, 7):
        cache.commit(lease, tokens[:end])
        assert cache.match_len("", tokens, 1000) == end
    cache.close(lease, tokens)
    assert cache.summary(0).num_nodes == 1
    cache.check()


def test_an_abort_with_nothing_computed_gives_every_page_back() -> None:
    cache = KVCache(num_pages=10, page_size=PAGE)
    cache.close(opened(cache, list(range(100))), ())
    assert cache.num_free_pages == 10 and cache.summary(0).num_nodes == 0
    cache.check()


# ---- pages and eviction --------------------------------------------------------------------------------------------


def test_the_prefix_let_go_longest_ago_is_evicted_first() -> None:
    cache = KVCache(num_pages=4, page_size=4)
    a, b, c, d = ([first, 1, 2, 3] for first in (10, 20, 30, 40))
    for tokens in (a, b, c, d):
        remember(cache, tokens)
    long_held = opened(cache, b, limit=4)
    cache.close(opened(cache, a, limit=4), ())
    cache.close(long_held, ())  # the order is now c, d, a, b
    for tokens, gone in zip(([50], [60], [70], [80]), (c, d, a, b), strict=True):
        assert cache.match_len("", gone, 4) == 4
        remember(cache, tokens)
        assert cache.match_len("", gone, 4) == 0


def test_leaves_go_before_the_prefix_they_share() -> None:
    cache = KVCache(num_pages=4, page_size=4)
    shared = [1, 2, 3, 4]
    remember(cache, [*shared, 5, 6, 7, 8])
    remember(cache, [*shared, 9, 10, 11, 12])
    remember(cache, [50, 51, 52, 53, 54, 55])  # one page was free, one is evicted: the older leaf
    assert cache.match_len("", [*shared, 5], 5) == 4
    assert cache.match_len("", [*shared, 9, 10, 11, 12], 8) == 8
    cache.check()


def test_a_long_leaf_loses_only_as_many_pages_as_are_needed() -> None:
    cache = KVCache(num_pages=10, page_size=4)
    tokens = list(range(38))
    remember(cache, tokens)
    lease = opened(cache, [100, 101, 102])
    assert cache.match_len("", tokens, 38) == 36 and cache.num_free_pages == 0
    assert cache.grow(lease, 9)
    assert cache.match_len("", tokens, 38) == 28 and cache.num_free_pages == 0
    cache.check()


def test_what_a_running_request_holds_is_never_evicted() -> None:
    cache = KVCache(num_pages=6, page_size=4)
    tokens = list(range(10))
    remember(cache, tokens)
    holder = cache.open("", tokens, 6)  # splits the prefix: what lies behind stays evictable
    assert holder is not None and holder.copy is not None
    assert cache.num_free_pages == 2 and cache.num_evictable_pages == 1
    other = opened(cache, [100] * 12)
    assert cache.num_available_pages == 0
    assert cache.match_len("", tokens, 10) == 8  # the third page went; the second one is held for its first half
    assert not cache.grow(other, 13) and len(other.pages) == 3
    assert cache.flush() == 0 and cache.match_len("", tokens, 10) == 6
    cache.close(other, ())
    cache.close(holder, ())
    assert cache.flush() == 2 and cache.num_free_pages == 6
    cache.check()


def test_a_lease_is_refused_when_no_page_is_left_for_its_copy() -> None:
    cache = KVCache(num_pages=2, page_size=4)
    remember(cache, [1, 2, 3, 4, 5, 6])
    assert cache.open("", [1, 2, 3, 4, 5, 60], 5) is None  # both pages are the match itself
    assert cache.num_evictable_pages == 2 and cache.summary(0).num_nodes == 1
    assert cache.match_len("", [1, 2, 3, 4, 5, 6], 6) == 6
    full_pages = cache.open("", [1, 2, 3, 4, 5, 60], 4)
    assert full_pages is not None and full_pages.copy is None and full_pages.num_cached == 4
    cache.check()


def test_growing_within_the_last_page_takes_none_and_handed_out_entries_stay() -> None:
    cache = KVCache(num_pages=4, page_size=4)
    lease = opened(cache, [1, 2, 3, 4, 5])
    pages = list(lease.pages)
    assert cache.grow(lease, 8) and lease.pages == pages
    assert cache.grow(lease, 9) and lease.pages[:2] == pages and len(lease.pages) == 3
    assert not cache.grow(lease, 17) and len(lease.pages) == 3


def test_pages_needed_tells_whether_a_request_has_room() -> None:
    cache = KVCache(num_pages=8, page_size=4)
    remember(cache, list(range(18)))  # five pages, three are free
    tokens = [*range(10), 100, 101, 102, 103]
    assert cache.pages_needed("", tokens, 13, 14) == 5  # holds two full pages and the one it copies, and takes two
    assert cache.pages_needed("", tokens, 13, 0) == 4
    before = cache.num_available_pages
    lease = opened(cache, tokens)
    assert before - cache.num_available_pages == 5
    assert cache.pages_needed("", tokens, 13, 14) == 2  # what is held already costs nothing
    cache.close(lease, ())


# ---- what operators see --------------------------------------------------------------------------------------------


def test_the_summary_tells_size_use_and_the_most_wanted_prefixes() -> None:
    clock = Clock()
    cache = KVCache(num_pages=20, page_size=4, now=clock)
    system = list(range(20))
    for user in (100, 200, 300):
        remember(cache, [*system, user, user + 1])
    cache.note_prompt(22, 0)
    cache.note_prompt(22, 20)
    clock.now_s += 5
    holder = opened(cache, [*system, 100, 101, 102], limit=22)
    summary = cache.summary(2)
    assert summary.num_nodes == 4 and summary.cached_tokens == 26 and summary.total_tokens == 80
    assert summary.free_tokens == cache.num_free_pages * 4 and summary.evictable_tokens == cache.num_evictable_pages * 4
    assert summary.hit_rate == 20 / 44
    top, second = summary.top_prefixes
    assert (top.num_tokens, top.hits, top.num_requests, top.age_s) == (20, 3, 1, 0.0)
    assert top.first_token_ids == tuple(range(16))
    assert (second.num_tokens, second.hits) == (22, 1)
    cache.close(holder, ())
    clock.now_s += 7
    assert [prefix.age_s for prefix in cache.summary(9).top_prefixes] == [7.0, 7.0, 12.0, 12.0]
    assert cache.summary(0).top_prefixes == ()


def test_hits_of_a_prefix_are_not_those_of_what_a_request_adds_to_it() -> None:
    cache = KVCache(num_pages=8, page_size=4)
    remember(cache, [1, 2, 3, 4])
    cache.close(opened(cache, list(range(1, 9)), limit=4), list(range(1, 9)))
    assert [(prefix.num_tokens, prefix.hits) for prefix in cache.summary(9).top_prefixes] == [(4, 1), (8, 0)]


def test_a_salt_that_is_evicted_leaves_nothing_behind() -> None:
    cache = KVCache(num_pages=4, page_size=4)
    for user in range(100):
        remember(cache, [1, 2, 3, 4, 5], salt=f"user {user}")
    assert cache.summary(0).num_nodes <= 4
    assert cache.flush() == 4
    assert cache.summary(0).num_nodes == 0 and cache.summary(0).cached_tokens == 0
    cache.check()


# ---- the checks themselves -----------------------------------------------------------------------------------------


def test_the_check_notices_a_lost_and_a_twice_owned_page() -> None:
    cache = KVCache(num_pages=8, page_size=4)
    lease, other = opened(cache, [1, 2, 3, 4, 5]), opened(cache, [6, 7])
    cache.check()
    lost = lease.pages.pop()
    with pytest.raises(AssertionError, match=f"page {lost}: 1 references, 0 holders"):
        cache.check()
    lease.pages.append(other.pages[0])
    with pytest.raises(AssertionError, match="a page has two owners"):
        cache.check()


def test_a_lease_cannot_be_used_after_it_was_closed() -> None:
    cache = KVCache(num_pages=8, page_size=4)
    lease = opened(cache, [1, 2, 3])
    cache.close(lease, ())
    for use in (lambda: cache.close(lease, ()), lambda: cache.grow(lease, 20), lambda: cache.commit(lease, [1])):
        with pytest.raises(AssertionError):
            use()
