"""PyTorch's TCPStore as a client of a given port, or as a server that says its port; then some work on keys shared with the other side."""

import sys
from datetime import timedelta

from torch.distributed import TCPStore

role, port = sys.argv[1], int(sys.argv[2])
store = TCPStore(
    "127.0.0.1", port, is_master=role == "server", wait_for_workers=False, timeout=timedelta(seconds=60), use_libuv=True
)
print(store.port, flush=True)
store.set("from-python", "hello")
assert store.get("from-rust") == b"good day", store.get("from-rust")
assert store.add("number", 40) in (40, 42)
assert store.compare_set("first", "", "python") in (b"python", b"rust")
store.append("list", "a")
store.append("list", "b")
assert store.get("list") == b"ab"
assert store.check(["from-rust"]) and not store.check(["absent"])
store.set("short-lived", "x")
assert store.delete_key("short-lived") and not store.delete_key("short-lived")
try:
    store.wait(["absent"], timedelta(milliseconds=100))
    raise AssertionError("a key that is not there was waited for with success")
except Exception as error:
    assert "imeout" in str(error) or "imed out" in str(error), error
store.set("python-done", "")
store.wait(["rust-done"])
