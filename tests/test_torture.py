"""A short form of `make torture`: some kills of a whole run, after which nothing is different."""

import random

import pytest
import torture
from conftest import read_params, write_photos
from repository import new_repository


@pytest.mark.long
def test_killed_runs_go_on_and_end_with_the_same_hashes(tmp_path, capfd):
    folder = tmp_path / "repo"
    write_photos(folder / "photos", each=40)
    new_repository(folder, read_params(prepare={"path": "photos"}))
    wrong = torture.torture(folder, kills=9, in_a_row=3, seed=random.Random(0).randrange(1000))
    said = capfd.readouterr().out
    assert wrong == 0, said
    assert "9 kills, 3 runs completed after them, 0 things wrong" in said
