//! Our store's client and server with PyTorch's own on the other side.

mod common;

use ddpm_dist::rendezvous::store::{Client, Server};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// The Python that `PYTHON` names (`python3` otherwise), if it has PyTorch.
fn python() -> Option<String> {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import torch"]).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    common::not_tested(&format!("our store with PyTorch's: {python} has no PyTorch; PYTHON may name one that has"));
    None
}

fn start(python: &str, role: &str, port: u16) -> Child {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/launchers/torch_store.py");
    Command::new(python).args([script, role, &port.to_string()]).stdout(Stdio::piped()).spawn().unwrap()
}

/// Our part of what the script does.
fn take_part(port: u16) {
    // Keys set from Python carry a leading slash.
    let mut store = Client::connect("127.0.0.1", port, "/", PATIENCE).unwrap();
    assert_eq!(store.get("from-python", PATIENCE).unwrap(), b"hello");
    store.set("from-rust", b"good day").unwrap();
    assert!([2, 42].contains(&store.add("number", 2).unwrap()));
    let first = store.compare_set("first", b"", b"rust").unwrap();
    assert!([&b"rust"[..], b"python"].contains(&&first[..]), "{first:?}");
    store.wait(&["python-done"], PATIENCE).unwrap();
    assert_eq!(store.get("number", PATIENCE).unwrap(), b"42");
    assert_eq!(store.get("list", PATIENCE).unwrap(), b"ab");
    assert!(store.wait(&["absent"], Duration::from_millis(50)).is_err());
    assert!(!store.has("short-lived").unwrap());
    store.set("rust-done", b"").unwrap();
}

#[test]
fn pytorch_is_a_client_of_our_server() {
    let Some(python) = python() else { return };
    let server = Server::listen(([127, 0, 0, 1], 0).into()).unwrap();
    let mut child = start(&python, "client", server.address().port());
    take_part(server.address().port());
    assert!(child.wait().unwrap().success());
}

#[test]
fn we_are_a_client_of_pytorchs_server() {
    let Some(python) = python() else { return };
    let mut child = start(&python, "server", 0);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    take_part(line.trim().parse().unwrap());
    assert!(child.wait().unwrap().success());
}
