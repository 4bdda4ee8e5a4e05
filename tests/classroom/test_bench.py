from course_lib.classroom import bench


def test_both_ways_train_every_network_and_are_timed_in_turn(digits):
    seconds = bench.measure("mlp8", replicas=3, epochs=1, rounds=2)
    assert {way: len(times) for way, times in seconds.items()} == {"loop": 2, "batched": 2}
    models = bench.tutorial_loop("mlp8", digits, range(2), epochs=1)
    assert len(models) == 2
    assert not (models[0].fc1.weight == models[1].fc1.weight).all()


def test_the_table_says_whether_the_targets_are_met(monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", lambda name, rounds: {"loop": [9.0, 8.5, 10.0], "batched": [1.0, 1.0, 1.0]})
    assert bench.main(rounds=3) == 0
    assert "9.0x (8.5-10.0)" in capsys.readouterr().out
    monkeypatch.setattr(bench, "measure", lambda name, rounds: {"loop": [5.0], "batched": [1.0]})
    assert bench.main(rounds=1) == 1
    shown = capsys.readouterr().out
    assert "a target was missed" in shown
