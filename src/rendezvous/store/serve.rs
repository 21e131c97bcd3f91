//! On which networks a store is served.

use super::Server;
use std::io;
use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};
use thiserror::Error;

/// Where the processes of a run meet, as the one that serves the store knows it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The name by which the others look for it.
    pub host: &'a str,
    /// TCP port; 0 lets the system choose one.
    pub port: u16,
    /// Whether all of them are on this machine.
    pub one_machine: bool,
    /// The address of this machine that the others are to use, if one was chosen.
    pub interface: Option<IpAddr>,
}

/// Why a store cannot be served.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The others look for it on another network than the one that was chosen.
    #[error("{host} is {found} here, but --interface is {chosen}")]
    OtherNetwork {
        /// The name by which they look for it.
        host: String,
        /// Its address.
        found: IpAddr,
        /// The address of the interface.
        chosen: IpAddr,
    },
    /// The system refuses the port.
    #[error("cannot listen on port {port}: {source}")]
    Listen {
        /// The port.
        port: u16,
        /// Why; `AddrInUse` where another process has it.
        source: io::Error,
    },
}

/// Serves a store: on loopback only where nobody else comes by; else on the network that was chosen, or on all.
///
/// # Errors
/// A place on another network than the chosen one, and a port that cannot be had.
pub fn serve(place: Place) -> Result<Server, ServeError> {
    let Place { host, port, one_machine, interface } = place;
    let served = match (one_machine, interface) {
        (true, _) => Server::listen((Ipv4Addr::LOCALHOST, port).into()),
        (false, Some(chosen)) => {
            check_network(host, &addresses(host, port), chosen)?;
            Server::listen((chosen, port).into())
        }
        (false, None) => Server::listen_everywhere(port),
    };
    served.map_err(|source| ServeError::Listen { port, source })
}

/// What a host's name means on this machine; nothing if that is not known.
pub fn addresses(host: &str, port: u16) -> Vec<IpAddr> {
    (host, port).to_socket_addrs().into_iter().flatten().map(|found| found.ip()).collect()
}

/// The host's name must not mean another network only. One that means loopback here may well mean the chosen network to the others.
fn check_network(host: &str, found: &[IpAddr], chosen: IpAddr) -> Result<(), ServeError> {
    match found.iter().find(|found| !found.is_loopback()) {
        Some(&other) if !found.contains(&chosen) => {
            Err(ServeError::OtherNetwork { host: host.to_string(), found: other, chosen })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::store::Client;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn here(one_machine: bool, interface: Option<IpAddr>) -> Server {
        serve(Place { host: "127.0.0.1", port: 0, one_machine, interface }).unwrap()
    }

    /// Whether a store answers there.
    fn answers(address: &str, server: &Server) -> bool {
        let port = server.address().port();
        let address: SocketAddr = (address.parse::<IpAddr>().unwrap(), port).into();
        TcpStream::connect_timeout(&address, PATIENCE).is_ok()
            && Client::connect(&address.ip().to_string(), port, "", PATIENCE).is_ok()
    }

    #[test]
    fn one_machine_and_a_chosen_network_are_reached_there_alone() {
        let loopback = here(true, None);
        assert!(answers("127.0.0.1", &loopback) && !answers("127.0.0.2", &loopback));
        let chosen = here(false, Some(IpAddr::from([127, 0, 0, 2])));
        assert!(answers("127.0.0.2", &chosen) && !answers("127.0.0.1", &chosen));
    }

    #[test]
    fn all_networks_are_those_of_both_kinds() {
        let server = here(false, None);
        assert!(answers("127.0.0.1", &server) && answers("127.0.0.2", &server));
        if TcpListener::bind("[::1]:0").is_ok() {
            assert!(answers("::1", &server));
        }
    }

    #[test]
    fn a_port_that_is_taken_is_said_to_be() {
        let first = here(false, None);
        let port = first.address().port();
        for one_machine in [true, false] {
            let ServeError::Listen { port: refused, source } =
                serve(Place { host: "h", port, one_machine, interface: None }).unwrap_err()
            else {
                panic!("another error")
            };
            assert_eq!((refused, source.kind()), (port, io::ErrorKind::AddrInUse));
        }
    }

    #[test]
    fn any_address_of_the_host_may_be_the_chosen_one() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (found, is_right) in [
            (vec!["10.0.0.1"], true),
            (vec!["192.168.0.1", "10.0.0.1"], true),
            (vec!["127.0.1.1"], true),
            (vec!["127.0.1.1", "192.168.0.1"], false),
            (vec!["fd00::1"], false),
            (vec![], true),
        ] {
            let found: Vec<IpAddr> = found.into_iter().map(ip).collect();
            assert_eq!(check_network("head", &found, ip("10.0.0.1")).is_ok(), is_right, "{found:?}");
        }
    }
}
