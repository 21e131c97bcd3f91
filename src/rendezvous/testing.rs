//! A store for tests, on this machine's loopback.

use super::store::{Client, Server};
use std::time::Duration;

/// Longer than connecting takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A store at a port that was free.
pub(crate) fn server() -> Server {
    Server::listen(([127, 0, 0, 1], 0).into()).unwrap()
}

/// A connection to the store at that port, or to one that will be there in a moment.
pub(crate) fn client(port: u16, prefix: &str) -> Client {
    Client::connect("127.0.0.1", port, prefix, PATIENCE).unwrap()
}
