"""One result ahead: map's results and errors in map's order."""

import threading

import pytest

from fedkrso_app.core.ahead import ahead


def test_results_are_those_of_map():
    assert list(ahead(lambda x: x * x, range(5))) == [0, 1, 4, 9, 16] and list(ahead(str, [])) == []


def test_the_next_result_is_made_while_this_one_is_used_and_no_other():
    begun = [threading.Event() for _ in range(4)]

    def call(i):
        begun[i].set()
        return i

    results = ahead(call, range(4))
    assert next(results) == 0 and begun[1].wait(10)
    assert not begun[2].is_set()
    assert list(results) == [1, 2, 3]


def test_an_error_comes_in_its_turn():
    results = ahead(lambda x: 1 // x, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
