//! The place where launchers meet: a port of node 0, and its name as the others know it.

use super::inbox::Inbox;
use super::meeting::{PREFIX, TICK};
use super::{Job, LaunchError};
use crate::rendezvous::store::{Client, Place, ServeError, Server};
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::time::Duration;

/// Serves the store of the run.
pub(super) fn serve(job: &Job) -> Result<Server, LaunchError> {
    let (host, port) = job.meet.as_ref().map_or(("", 0), |(host, port)| (host.as_str(), *port));
    let place = Place { host, port, one_machine: job.nodes == 1, interface: job.interface };
    crate::rendezvous::store::serve(place).map_err(|error| match error {
        ServeError::OtherNetwork { host, found, chosen } => LaunchError::OtherNetwork { host, found, chosen },
        ServeError::Listen { port, source } if source.kind() == io::ErrorKind::AddrInUse => {
            LaunchError::PortTaken { port }
        }
        ServeError::Listen { port, source } => LaunchError::Listen { port, source },
    })
}

/// Connects by a thread of its own, so that a signal can end the wait.
pub(super) fn connect(host: &str, port: u16, patience: Duration, inbox: &mut Inbox) -> Result<Client, LaunchError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let host = host.to_string();
    let connecting = std::thread::Builder::new().name("connect".into());
    connecting
        .spawn(move || sender.send(Client::connect(&host, port, PREFIX, patience)))
        .map_err(|source| LaunchError::Listen { port, source })?;
    loop {
        // Soon enough for a person, and at once where the store is there.
        if let Ok(connected) = receiver.recv_timeout(TICK) {
            return Ok(connected?);
        }
        inbox.wait(Duration::ZERO);
        if let Some(signal) = inbox.stop {
            return Err(LaunchError::Stopped(signal));
        }
    }
}

/// What a host's name means on this node.
pub(super) fn resolve(host: &str, port: u16) -> Option<IpAddr> {
    Some((host, port).to_socket_addrs().ok()?.next()?.ip())
}

/// The meeting place as all can reach it. Many systems give their own name a loopback address: a rank of node 0 would come to the store by
/// that, and tell the others to find it there.
pub(super) fn host_for_all(host: &str, seen: &[Option<IpAddr>]) -> String {
    let is_own_loopback = seen.first().copied().flatten().is_some_and(|ip| ip.is_loopback());
    let elsewhere = seen.iter().flatten().find(|ip| !ip.is_loopback());
    match elsewhere {
        Some(ip) if is_own_loopback => ip.to_string(),
        _ => host.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_means_loopback_on_node_0_only_is_replaced() {
        let ip = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        for (seen, expected) in [
            (vec![ip("127.0.1.1"), ip("10.0.0.1")], "10.0.0.1"),
            (vec![ip("10.0.0.1"), ip("10.0.0.1")], "head"),
            (vec![ip("127.0.0.1"), ip("127.0.0.1")], "head"),
            (vec![None, ip("10.0.0.1")], "head"),
            (vec![ip("127.0.0.1"), None, ip("fd00::1")], "fd00::1"),
        ] {
            assert_eq!(host_for_all("head", &seen), expected, "{seen:?}");
        }
    }
}
