"""The tests' second user is another user: what is private to us is shut to him, what is open is not."""

from second_user import as_second_user, let_in, needs_second_user

READ = "import sys; print(open(sys.argv[1]).read())"


@needs_second_user
def test_he_reads_what_is_open_and_nothing_else(tmp_path):
    (file := let_in(tmp_path) / "file").write_text("words")
    file.chmod(0o644)
    assert as_second_user(READ, file).stdout == "words\n"
    file.chmod(0o600)
    assert "PermissionError" in as_second_user(READ, file).stderr
