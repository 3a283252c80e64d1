"""What a drafter has read of pages, against a set of (page, offset) pairs."""

from random import Random

from streamserve.engine.drafters.page_memory import PageMemory


def test_a_prefix_is_read_up_to_its_first_hole() -> None:
    memory = PageMemory(8, 4)
    assert memory.opened([3, 5, 1], 0) == 0
    memory.has_read([3, 5, 1], 0, 4)
    memory.has_read([3, 5, 1], 6, 11)  # 4 and 5 were not
    assert memory.opened([3, 5, 1, 2], 11) == 4
    memory.has_read([3, 5, 1, 2], 4, 8)
    assert memory.opened([3, 5, 1, 2], 11) == 11
    assert memory.opened([3, 5, 1, 2], 10) == 10  # what lies behind will be written anew
    assert memory.opened([3, 5, 1, 2], 11) == 10


def test_the_copy_of_a_page_was_read_as_far_as_the_page_and_a_page_handed_out_anew_was_not() -> None:
    memory = PageMemory(8, 4)
    memory.has_read([6, 7], 0, 7)
    memory.copied(7, 2)
    assert memory.opened([6, 2, 0], 6) == 6
    memory.fresh([6])
    assert memory.opened([6, 2, 0], 6) == 0


def test_whatever_is_read_in_whatever_order_nothing_counts_that_was_not_read() -> None:
    random, size = Random(1), 3
    memory, read = PageMemory(12, size), set[tuple[int, int]]()
    for _ in range(300):
        pages = random.sample(range(12), 4)
        num_cached = random.randrange(12)
        held = -(-num_cached // size)
        read -= {(page, offset) for page in pages[held:] for offset in range(size)}
        if num_cached % size:
            read -= {(pages[held - 1], offset) for offset in range(num_cached % size, size)}
        found = memory.opened(pages, num_cached)
        assert all((pages[at // size], at % size) in read for at in range(found))
        start = found if random.random() < 0.7 else random.randrange(12)
        end = random.randint(start, 12)
        memory.has_read(pages, start, end)
        read |= {(pages[at // size], at % size) for at in range(start, end)}
        assert memory.opened(pages, 12) >= (end if start == found else 0)
