"""What lies in a folder: links are followed, and a circle of them leads nowhere in it."""

from __future__ import annotations

from arriero.runtimes.inside import leads_out, links_out


def test_links_that_lead_out_or_nowhere(tmp_path):
    home = tmp_path / "home"
    (home / "in").mkdir(parents=True)
    (home / "file").write_text("1")
    (tmp_path / "outside").write_text("2")
    (home / "in" / "near").symlink_to("../file")
    (home / "far").symlink_to("../outside")
    (home / "circle").symlink_to("circle")
    (home / "one").symlink_to("two")
    (home / "two").symlink_to("one")
    assert not leads_out(home / "in" / "near", home)
    assert leads_out(home / "far", home)
    assert leads_out(home / "circle", home)
    assert sorted(links_out(home)) == ["circle", "far", "one", "two"]
