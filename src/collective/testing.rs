//! Ranks as threads of one process, over real sockets.

use super::Collective;
use super::host::{Host, Meeting};
use crate::rendezvous::store::{Client, Server};
use crate::rendezvous::{StoreAddress, StoreHost};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `work` as every rank of a world; gives what each returns.
pub(crate) fn world<T: Send>(size: usize, work: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
    let server = Server::listen(([127, 0, 0, 1], 0).into()).unwrap();
    let address =
        StoreAddress { host: "127.0.0.1".into(), port: server.address().port(), served_by: StoreHost::RankZero };
    let join = |rank: usize| {
        let store = Client::connect(&address, "/test/", PATIENCE).unwrap();
        Host::join(Meeting { rank, size, one_machine: true, store, patience: PATIENCE }, PATIENCE).unwrap()
    };
    std::thread::scope(|scope| {
        let (join, work) = (&join, &work);
        let ranks: Vec<_> = (0..size).map(|rank| scope.spawn(move || work(&mut join(rank)))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
