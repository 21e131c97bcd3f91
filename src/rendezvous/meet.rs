//! A rank serves the store, or comes to it.

use super::interface::{address_for_others, is_loopback};
use super::store::{Client, Place, ServeError, Server, StoreError, addresses, serve};
use super::{StoreAddress, StoreHost, World};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

impl World {
    /// Whether all ranks are on this machine.
    pub fn is_one_machine(&self) -> bool {
        self.local_size == self.size
    }

    /// Serves the store, where that is this rank's part. `interface` is the address that the others are to use, if one was chosen.
    ///
    /// # Errors
    /// As [`serve`].
    pub fn serve_store(&self, interface: Option<IpAddr>) -> Result<Option<Server>, ServeError> {
        if self.store.served_by != StoreHost::RankZero || self.rank != 0 {
            return Ok(None);
        }
        let (host, port) = (self.store.host.as_str(), self.store.port);
        serve(Place { host, port, one_machine: self.is_one_machine(), interface }).map(Some)
    }

    /// A connection to the store. Its keys are those of this start of this run: a store may outlive it, and others may come by.
    ///
    /// # Errors
    /// A store that is not there, or that shows no address of this machine at which the other machines reach it.
    pub fn connect(&self, interface: Option<IpAddr>, patience: Duration) -> Result<Client, StoreError> {
        let host = self.way_to_store(interface);
        let mut client = Client::connect(&host, self.store.port, &self.keys(), patience)?;
        let here = match interface {
            None if !self.is_one_machine() => self.address_beyond(client.local_address()?)?,
            chosen => chosen,
        };
        client.reach_at(here);
        Ok(client)
    }

    /// When this run was started first, in time since 1970, if that was before `now`: as the store has it, which outlives the starts of a
    /// launcher that starts it again.
    ///
    /// # Errors
    /// A store that is not there.
    pub fn first_started(
        &self,
        now: Duration,
        interface: Option<IpAddr>,
        patience: Duration,
    ) -> Result<Duration, StoreError> {
        let prefix = format!("ddpm-dist/{}/", self.run);
        let mut client = Client::connect(&self.way_to_store(interface), self.store.port, &prefix, patience)?;
        let noted = client.compare_set("started", b"", now.as_secs().to_string().as_bytes())?;
        let seconds = std::str::from_utf8(&noted).ok().and_then(|text| text.parse().ok());
        Ok(seconds.map_or(now, Duration::from_secs).min(now))
    }

    /// What the keys of this start of this run begin with.
    fn keys(&self) -> String {
        format!("ddpm-dist/{}/{}/", self.run, self.attempt)
    }

    /// The name or address by which this rank reaches the store.
    fn way_to_store(&self, interface: Option<IpAddr>) -> String {
        let StoreAddress { host, port, served_by } = &self.store;
        let is_here = || {
            let found = addresses(host, *port);
            self.rank == 0 || (!found.is_empty() && found.iter().all(IpAddr::is_loopback))
        };
        match interface {
            _ if *served_by == StoreHost::Launcher => host.clone(),
            // Rank 0 listens on loopback then, whatever the name of this machine means.
            _ if self.is_one_machine() => Ipv4Addr::LOCALHOST.to_string(),
            // Its own name may mean loopback on the store's machine, which does not listen there then.
            Some(chosen) if is_here() => chosen.to_string(),
            _ => host.clone(),
        }
    }

    /// Another address of this machine than the one that the store was reached from, if that is good here only: a system may give the
    /// store's own machine a loopback address (127.0.1.1) for its name.
    fn address_beyond(&self, found: IpAddr) -> Result<Option<IpAddr>, StoreError> {
        // Where the store is at `localhost`, what calls itself several machines is one.
        if !found.is_loopback() || is_loopback(&self.store.host) {
            return Ok(None);
        }
        match address_for_others(found)? {
            Some(address) => Ok(Some(address)),
            None => Err(StoreError::OnlyLoopback { host: self.store.host.clone(), found }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::{Launcher, testing};

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Rank `rank` of two, each on a machine of its own unless `one_machine`.
    fn world(rank: usize, host: &str, port: u16, one_machine: bool) -> World {
        let store = StoreAddress { host: host.into(), port, served_by: StoreHost::RankZero };
        let (local_rank, local_size) = if one_machine { (rank, 2) } else { (0, 1) };
        World {
            launcher: Launcher::Slurm,
            rank,
            size: 2,
            local_rank,
            local_size,
            store,
            run: String::new(),
            attempt: 0,
        }
    }

    #[test]
    fn the_way_to_the_store_is_where_it_listens() {
        let chosen = Some(IpAddr::from([10, 0, 0, 1]));
        for (rank, host, one_machine, interface, expected) in [
            (0, "10.9.9.9", true, None, "127.0.0.1"),
            (1, "10.9.9.9", true, chosen, "127.0.0.1"),
            (0, "10.9.9.9", false, None, "10.9.9.9"),
            (0, "10.9.9.9", false, chosen, "10.0.0.1"),
            (1, "10.9.9.9", false, chosen, "10.9.9.9"),
            (1, "127.0.1.1", false, chosen, "10.0.0.1"),
        ] {
            let way = world(rank, host, 1, one_machine).way_to_store(interface);
            assert_eq!(way, expected, "rank {rank}, {host}, one machine: {one_machine}, {interface:?}");
        }
    }

    #[test]
    fn a_run_that_is_started_again_knows_when_it_was_started_first() {
        let server = testing::server();
        let mut world = world(0, "127.0.0.1", server.address().port(), true);
        let started =
            |world: &World, now| world.first_started(Duration::from_secs(now), None, PATIENCE).unwrap().as_secs();
        assert_eq!(started(&world, 1000), 1000);
        world.attempt = 1;
        assert_eq!(started(&world, 1500), 1000);
        // A clock that is behind the one that noted it.
        assert_eq!(started(&world, 900), 900);
        world.run = "another".into();
        assert_eq!(started(&world, 2000), 2000);
    }

    /// Rank 0's own machine may know its name as a loopback address, at which no other machine finds it.
    #[test]
    fn ranks_of_several_machines_tell_no_loopback_address() {
        let server = testing::server();
        let port = server.address().port();
        let at_localhost = world(0, "127.0.0.1", port, false).connect(None, PATIENCE).unwrap();
        assert!(at_localhost.local_address().unwrap().is_loopback(), "there is only this machine");

        let named = world(0, "head", port, false);
        let found = IpAddr::V4(Ipv4Addr::LOCALHOST);
        match (named.address_beyond(found), address_for_others(found).unwrap()) {
            (Ok(Some(told)), Some(address)) => assert!(told == address && !told.is_loopback(), "{told}"),
            (Err(error), None) => assert!(error.to_string().contains("--interface"), "{error}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(named.address_beyond(IpAddr::from([10, 0, 0, 1])).unwrap(), None, "the way to the store is good");
    }
}
