from conftest import paths


def test_whole_run(finished):
    assert (paths(finished)["evaluate"]["final"] / "model.safetensors").exists()
