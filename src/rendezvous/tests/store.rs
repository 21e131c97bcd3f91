//! Client and server over real sockets, and what the server makes of garbage. (PyTorch's own client and server are met by
//! `tests/launchers/torch_store.py`.)

use crate::rendezvous::store::{Client, Server, StoreError};
use crate::rendezvous::testing::{self, server};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

fn client(server: &Server, prefix: &str) -> Client {
    testing::client(server.address().port(), prefix)
}

#[test]
fn keys_and_values_are_shared_and_prefixes_keep_worlds_apart() {
    let server = server();
    let [mut a, mut b, mut other] = ["/run/0/", "/run/0/", "/run/1/"].map(|prefix| client(&server, prefix));
    a.set("x", b"one").unwrap();
    assert_eq!(b.get("x", PATIENCE).unwrap(), b"one");
    assert!(b.has("x").unwrap() && !other.has("x").unwrap());
    assert_eq!((a.add("n", 2).unwrap(), b.add("n", 40).unwrap(), other.add("n", 1).unwrap()), (2, 42, 1));
    assert_eq!(a.get("n", PATIENCE).unwrap(), b"42", "numbers are kept as text, as torchrun's clients expect");
    assert_eq!(a.compare_set("first", b"", b"a").unwrap(), b"a");
    assert_eq!(b.compare_set("first", b"", b"b").unwrap(), b"a");
    assert_eq!(b.compare_set("first", b"a", b"b").unwrap(), b"b");
    assert_eq!(b.compare_set("absent", b"a", b"b").unwrap(), b"a");
    assert!(!a.has("absent").unwrap());
    assert!(a.delete("x").unwrap() && !b.delete("x").unwrap());
    let long = vec![7; 3 << 20];
    a.set("long", &long).unwrap();
    assert_eq!(b.get("long", PATIENCE).unwrap(), long);
}

#[test]
fn a_wait_ends_when_the_last_key_is_there() {
    let server = server();
    let (mut setter, mut waiter) = (client(&server, ""), client(&server, ""));
    let waiting = std::thread::spawn(move || {
        waiter.wait(&["a", "b"], PATIENCE).unwrap();
        waiter.add("seen", 1).unwrap()
    });
    setter.set("b", b"").unwrap();
    setter.set("a", b"").unwrap();
    assert_eq!(waiting.join().unwrap(), 1);
}

#[test]
fn a_key_that_does_not_appear_is_named_and_the_connection_goes_on() {
    let server = server();
    let (mut a, mut b) = (client(&server, ""), client(&server, ""));
    match a.wait(&["rank-3"], Duration::from_millis(30)).unwrap_err() {
        StoreError::TimedOut { key, .. } => assert_eq!(key, "rank-3"),
        other => panic!("{other}"),
    }
    b.set("rank-3", b"late").unwrap();
    assert_eq!(a.get("rank-3", PATIENCE).unwrap(), b"late");
}

#[test]
fn waits_that_are_taken_back_as_they_end_leave_no_answer_behind() {
    let server = server();
    let (mut a, mut b) = (client(&server, ""), client(&server, ""));
    for round in 0..300 {
        let key = format!("k{round}");
        let setting = {
            let key = key.clone();
            let mut c = std::mem::replace(&mut b, client(&server, ""));
            std::thread::spawn(move || c.set(&key, b"").unwrap())
        };
        // Either may come first.
        let _ = a.wait(&[&key], Duration::from_micros(150));
        setting.join().unwrap();
        assert_eq!(a.add("round", 1).unwrap(), round + 1, "answers are those of their requests");
    }
}

#[test]
fn nobody_at_the_address_is_said_by_the_deadline() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = Instant::now();
    let error = Client::connect("127.0.0.1", port, "", Duration::from_millis(200)).unwrap_err();
    assert!(
        matches!(error, StoreError::Unreachable { .. }) && error.to_string().contains(&port.to_string()),
        "{error}"
    );
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn something_else_at_the_address_is_no_store() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n");
        }
    });
    // Long enough for one answer on a machine that has much to do.
    let error = Client::connect("127.0.0.1", port, "", Duration::from_secs(2)).unwrap_err();
    assert!(error.to_string().contains("no store"), "{error}");
}

#[test]
fn a_server_knows_when_all_have_left() {
    let server = server();
    assert!(server.until_all_have_left(Duration::ZERO));
    let (mut first, second) = (client(&server, ""), client(&server, ""));
    // An answer shows that its connection is known.
    first.has("key").unwrap();
    drop(second);
    assert!(!server.until_all_have_left(Duration::from_millis(50)));
    drop(first);
    assert!(server.until_all_have_left(Duration::from_secs(20)));
}

#[test]
fn a_store_that_ends_is_lost_at_once() {
    let server = server();
    let mut a = client(&server, "");
    let waiting = std::thread::spawn(move || a.wait(&["never"], PATIENCE).unwrap_err());
    let mut probe = client(&server, "");
    probe.set("x", b"").unwrap();
    let start = Instant::now();
    drop(server);
    assert!(matches!(waiting.join().unwrap(), StoreError::Lost { .. }));
    assert!(probe.has("x").is_err());
    assert!(start.elapsed() < PATIENCE);
}

/// Sends bytes and returns whether the server ends the connection. (A server that does not would block the read for good: the time-out
/// makes that a failure.)
fn is_cut_off(server: &Server, bytes: &[u8]) -> bool {
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The server may have hung up before all is sent.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

const HELLO: [u8; 5] = [0, 0xCE, 0xF7, 0x85, 0x3C];

proptest! {
    #[test]
    fn garbage_ends_its_own_connection_and_no_other(
        greeted: bool,
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let server = server();
        let mut good = client(&server, "");
        let sent = if greeted { [&HELLO[..], &bytes].concat() } else { bytes };
        prop_assert!(is_cut_off(&server, &sent));
        good.set("still", b"here").unwrap();
        prop_assert_eq!(good.get("still", PATIENCE).unwrap(), b"here");
    }
}

#[test]
fn lengths_that_are_announced_are_bounded() {
    let server = server();
    let length = |n: u64| n.to_le_bytes();
    for request in [
        [&[1][..], &length(u64::MAX)].concat(),
        [&[1][..], &length(1 << 20)].concat(),
        [&[1][..], &length(1), b"k", &length(u64::MAX)].concat(),
        [&[6][..], &length(u64::MAX)].concat(),
        // Keys of which each is short enough, but not all together.
        [&[6][..], &length(1025), &[&length(8 << 10)[..], &[b'k'; 8 << 10]].concat().repeat(1025)].concat(),
        [&[3][..], &length(6), b"absent"].concat(),
        vec![255],
    ] {
        // Without an end of what is sent: it is the server that hangs up.
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may hang up before all is sent.
        let _ = stream.write_all(&[&HELLO[..], &request].concat());
        let ended = stream.read(&mut [0; 1]);
        assert!(matches!(ended, Ok(0)) || ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    }
    // What is kept in all is bounded too.
    let mut greedy = client(&server, "");
    let value = vec![0; 8 << 20];
    let refused = (0..40).position(|i| greedy.set(&format!("k{i}"), &value).is_err() || greedy.has("k0").is_err());
    assert!(refused.is_some_and(|at| at >= 31), "{refused:?}");
    assert!(client(&server, "").has("k30").unwrap());
}

#[test]
fn a_client_that_takes_no_answers_holds_up_nobody() {
    let server = server();
    let mut good = client(&server, "");
    good.set("long", &vec![0; 4 << 20]).unwrap();
    let key = |key: &str| [&(key.len() as u64).to_le_bytes()[..], key.as_bytes()].concat();
    let (get, wait) = ([&[3][..], &key("long")].concat(), [&[6][..], &1u64.to_le_bytes(), &key("go")].concat());
    // It waits and asks at the same time, or asks for more than it takes before it waits.
    let greedy: Vec<TcpStream> = [[&wait[..], &get].concat(), [&get.repeat(8)[..], &wait].concat()]
        .iter()
        .map(|requests| {
            let mut stream = TcpStream::connect(server.address()).unwrap();
            stream.write_all(&[&HELLO[..], requests].concat()).unwrap();
            stream
        })
        .collect();
    // The first of them has been read when the server waits for it or has cut it off; before that this test shows nothing.
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    good.set("go", b"").unwrap();
    assert!(good.has("go").unwrap());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(greedy);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a store answers, a client ends in time with a value or an error. Half of the answers come drop by drop.
    #[test]
    fn a_client_survives_any_answer(
        answers in proptest::collection::vec(any::<u8>(), 0..40), what in 0..6, drips: bool, stays: bool,
    ) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let patience = Duration::from_millis(150);
        let (over, wait) = std::sync::mpsc::channel::<()>();
        let store = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 10];
            stream.read_exact(&mut hello).unwrap();
            // The greeting is answered as it should be.
            stream.write_all(&hello[6..]).unwrap();
            for piece in answers.chunks(if drips { 1 } else { 40 }) {
                std::thread::sleep(Duration::from_millis(if drips { 20 } else { 0 }));
                let _ = stream.write_all(piece);
            }
            if stays {
                let _ = wait.recv();
            }
        });
        let mut client = testing::client(port, "");
        client.answer_within(patience);
        let start = Instant::now();
        let failed = match what {
            0 => client.get("k", patience).is_err(),
            1 => client.add("k", 1).is_err(),
            2 => client.compare_set("k", b"", b"v").is_err(),
            3 => client.has("k").is_err(),
            4 => client.wait(&["a", "b"], patience).is_err(),
            _ => client.delete("k").is_err(),
        };
        // A wait, its end taken back, and a value.
        let took = start.elapsed();
        prop_assert!(took < 6 * patience + Duration::from_secs(1), "{took:?}, failed: {failed}");
        drop(over);
        store.join().unwrap();
    }
}
