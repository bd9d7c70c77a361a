"""The methods' coefficients: the conditions that make them what they are."""

from __future__ import annotations

import itertools

import pytest

from fusedres.ode import METHODS


def conditions(tableau, b):
    """The order conditions up to order four: name, left side, right side (Butcher 1963, as rooted trees)."""
    c, a = tableau.c, [(*row, *[0.0] * (len(tableau.c) - len(row))) for row in tableau.a]
    n = range(len(c))
    inner = [sum(a[i][j] * c[j] for j in n) for i in n]
    squares = [sum(a[i][j] * c[j] ** 2 for j in n) for i in n]
    nested = [sum(a[i][j] * inner[j] for j in n) for i in n]
    return {
        1: [(sum(b), 1)],
        2: [(sum(b[i] * c[i] for i in n), 1 / 2)],
        3: [(sum(b[i] * c[i] ** 2 for i in n), 1 / 3), (sum(b[i] * inner[i] for i in n), 1 / 6)],
        4: [
            (sum(b[i] * c[i] ** 3 for i in n), 1 / 4),
            (sum(b[i] * c[i] * inner[i] for i in n), 1 / 8),
            (sum(b[i] * squares[i] for i in n), 1 / 12),
            (sum(b[i] * nested[i] for i in n), 1 / 24),
        ],
    }


@pytest.mark.parametrize("tableau", METHODS.values(), ids=METHODS)
def test_rows_sum_to_their_times_and_the_order_is_reached(tableau):
    for c, row in zip(tableau.c, tableau.a):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    for order, pairs in conditions(tableau, tableau.b).items():
        met = all(left == pytest.approx(right, abs=1e-13) for left, right in pairs)
        assert met is (order <= tableau.order), order


def test_the_estimate_is_the_difference_to_a_method_of_order_four():
    tableau = METHODS["dopri5"]
    fourth = [b - e for b, e in zip(tableau.b, tableau.error)]
    pairs = itertools.chain.from_iterable(conditions(tableau, fourth).values())
    assert all(left == pytest.approx(right, abs=1e-13) for left, right in pairs)
    assert sum(b * c**4 for b, c in zip(tableau.b, tableau.c)) == pytest.approx(1 / 5)
    assert sum(b * c**4 for b, c in zip(fourth, tableau.c)) != pytest.approx(1 / 5)


def test_only_dopri5_ends_where_it_begins():
    assert [name for name, tableau in METHODS.items() if tableau.first_same_as_last] == ["dopri5"]


def test_the_continuous_extension():
    tableau = METHODS["dopri5"]
    assert tableau.within(0.0) == (0.0,) * 7
    assert tableau.within(1.0) == pytest.approx(tableau.b, abs=1e-14)
    assert tableau.within(0.5) == pytest.approx(tableau.middle, abs=1e-14)
    for x in (0.1, 0.37, 0.9):  # exact for polynomials up to the fourth degree: order four
        for power in range(4):
            found = sum(w * c**power for w, c in zip(tableau.within(x), tableau.c))
            assert found == pytest.approx(x ** (power + 1) / (power + 1), abs=1e-9)
