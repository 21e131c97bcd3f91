//! The networks of this machine, by the names of their interfaces.

use std::io;
use std::net::{IpAddr, TcpListener};
use thiserror::Error;

/// Why an interface cannot be used.
#[derive(Debug, Error)]
pub enum InterfaceError {
    /// The system does not list them.
    #[error("the system does not tell which network interfaces there are: {0}")]
    System(io::Error),
    /// No interface of that name.
    #[error("`{name}` is no network interface of this machine, nor an address; there are: {there}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// All there are, with their addresses.
        there: String,
    },
    /// Another machine's address.
    #[error("{address} is no address of this machine; there are: {there}")]
    NotHere {
        /// What was asked for.
        address: IpAddr,
        /// All there are, with their addresses.
        there: String,
    },
}

/// The address that an interface's name, or an address itself, stands for on this machine: the first IPv4 address, else the first IPv6
/// address that is good beyond its own cable.
///
/// # Errors
/// What this machine does not have, with a list of what it has.
pub fn address_of_interface(text: &str) -> Result<IpAddr, InterfaceError> {
    let interfaces = if_addrs::get_if_addrs().map_err(InterfaceError::System)?;
    let all: Vec<(String, IpAddr)> = interfaces.into_iter().map(|i| (i.name.clone(), i.ip())).collect();
    choose(text, &all, |address| TcpListener::bind((address, 0)).is_ok())
}

fn choose(text: &str, all: &[(String, IpAddr)], is_here: impl Fn(IpAddr) -> bool) -> Result<IpAddr, InterfaceError> {
    let there = || {
        let list: Vec<String> = all.iter().map(|(name, address)| format!("{name} ({address})")).collect();
        list.join(", ")
    };
    if let Ok(address) = text.parse::<IpAddr>() {
        return if is_here(address) { Ok(address) } else { Err(InterfaceError::NotHere { address, there: there() }) };
    }
    let addresses = || all.iter().filter(|(name, _)| name == text).map(|(_, address)| *address);
    let usable = |address: &IpAddr| match address {
        IpAddr::V4(_) => true,
        // It would need the number of the interface, too, which is each machine's own.
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    addresses()
        .find(IpAddr::is_ipv4)
        .or_else(|| addresses().find(usable))
        .ok_or_else(|| InterfaceError::Unknown { name: text.to_string(), there: there() })
}

/// Whether a host's name or address means loopback on every machine, so that only one can be meant.
pub(super) fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// An address at which other machines are likely to reach this one, if it has any; one of the same family as `like` if there is such.
pub(super) fn address_for_others(like: IpAddr) -> Result<Option<IpAddr>, InterfaceError> {
    let interfaces = if_addrs::get_if_addrs().map_err(InterfaceError::System)?;
    let all: Vec<(IpAddr, bool)> = interfaces.iter().map(|i| (i.ip(), i.is_oper_up())).collect();
    Ok(choose_for_others(like, &all))
}

/// The first of the family that is up, else what comes closest; never one that is good on its own cable only.
fn choose_for_others(like: IpAddr, all: &[(IpAddr, bool)]) -> Option<IpAddr> {
    let is_routable = |address: &IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    };
    let routable = all.iter().filter(|(address, _)| is_routable(address));
    routable.min_by_key(|(address, is_up)| (address.is_ipv4() != like.is_ipv4(), !is_up)).map(|(address, _)| *address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_by_any_name() {
        assert!(["localhost", "LOCALHOST", "127.0.0.1", "127.0.1.1", "::1"].into_iter().all(is_loopback));
        assert!(!["node0", "10.0.0.1", "fd00::1", "localhost.example.org", ""].into_iter().any(is_loopback));
    }

    #[test]
    fn an_address_for_others_is_up_and_beyond_its_cable() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = |list: &[(&str, bool)]| -> Vec<(IpAddr, bool)> { list.iter().map(|(a, up)| (ip(a), *up)).collect() };
        let machine =
            [("127.0.0.1", true), ("172.17.0.1", false), ("10.0.0.5", true), ("10.1.0.5", true), ("fd00::5", true)];
        for (like, list, expected) in [
            ("127.0.1.1", &machine[..], Some("10.0.0.5")),
            ("::1", &machine, Some("fd00::5")),
            ("127.0.1.1", &machine[..2], Some("172.17.0.1")),
            ("127.0.1.1", &[("::1", true), ("fe80::1", true), ("fd00::5", true)], Some("fd00::5")),
            ("127.0.1.1", &[("127.0.0.1", true), ("169.254.3.4", true), ("fe80::1", true)], None),
        ] {
            assert_eq!(choose_for_others(ip(like), &all(list)), expected.map(ip), "{list:?}");
        }
    }

    #[test]
    fn names_and_addresses() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all: Vec<(String, IpAddr)> = [
            ("lo", "127.0.0.1"),
            ("eth0", "fe80::1"),
            ("eth0", "fd00::5"),
            ("eth0", "10.0.0.5"),
            ("ib0", "fe80::2"),
            ("ib0", "fd01::7"),
            ("ib1", "fe80::3"),
        ]
        .map(|(name, address)| (name.to_string(), ip(address)))
        .to_vec();
        let is_here = |address| all.iter().any(|(_, a)| *a == address);
        for (text, expected) in [
            ("lo", "127.0.0.1"),
            ("eth0", "10.0.0.5"),
            ("ib0", "fd01::7"),
            ("10.0.0.5", "10.0.0.5"),
            ("fd01::7", "fd01::7"),
        ] {
            assert_eq!(choose(text, &all, is_here).unwrap(), ip(expected), "{text}");
        }
        for text in ["eth", "eth00", "", "ib1", "10.0.0.6"] {
            let error = choose(text, &all, is_here).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("ib0 (fd01::7)"), "{error}");
        }
    }

    #[test]
    fn this_machine_has_a_loopback() {
        assert!(address_of_interface("lo").unwrap().is_loopback());
        assert!(address_of_interface("127.0.0.2").unwrap().is_loopback(), "all of 127/8 is here");
        // An address that is kept for documentation (RFC 5737).
        assert!(matches!(address_of_interface("192.0.2.1"), Err(InterfaceError::NotHere { .. })));
    }
}
