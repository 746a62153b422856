"""Work that is shared out to devices: its order, how far it runs ahead, and its end."""

import threading
import time

import pytest

from moemerge.passes.sharing_out import hands_of, shared_out


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_what_is_made_comes_in_the_order_of_the_parts_whatever_device_is_slow(devices):
    def work(device: int, part: int) -> tuple[int, int, int]:
        time.sleep(0.002 * (device == 0))
        return part, device, threading.get_ident()

    made = list(shared_out(work, range(10), devices))
    assert [part for part, _, _ in made] == list(range(10))
    assert [device for _, device, _ in made] == [part % devices for part in range(10)]
    assert len({thread for _, _, thread in made}) == devices
    assert all((thread == threading.get_ident()) == (devices == 1) for _, _, thread in made)


def test_few_parts_are_begun_before_the_first_is_used():
    threads, begun = threading.active_count(), list[int]()
    made = shared_out(lambda _device, part: begun.append(part), range(100), 2)
    for used in range(1, 90):
        next(made)
        time.sleep(0.001)
        assert len(begun) <= used + 4
    made.close()
    assert len(begun) <= 93
    assert threading.active_count() == threads


def test_an_error_comes_at_its_part_and_ends_the_rest():
    threads, begun = threading.active_count(), list[int]()

    def work(_device: int, part: int) -> int:
        begun.append(part)
        if part == 3:
            raise ValueError("the fourth")
        return part

    made, used = shared_out(work, range(100), 2), []
    with pytest.raises(ValueError, match="the fourth"):
        used.extend(made)
    assert used == [0, 1, 2]
    assert len(begun) <= 7
    assert threading.active_count() == threads


def test_much_text_is_dealt_out_evenly():
    lengths = [1 + number * 7919 % 512 for number in range(100_000)]
    hands = hands_of(lengths, 8)  # in minutes, if each hand were added up for each text
    assert sorted(number for hand in hands for number in hand) == list(range(100_000))
    totals = [sum(lengths[number] for number in hand) for hand in hands]
    assert max(totals) - min(totals) <= 512
