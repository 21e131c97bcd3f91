//! Ranks as threads of one process, over real sockets.

use super::Collective;
use super::host::{Host, Meeting};
use crate::rendezvous::testing::{client, server};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `work` as every rank of a world; gives what each returns.
pub(crate) fn world<T: Send>(size: usize, work: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
    let server = server();
    let join = |rank: usize| {
        let store = client(server.address().port(), "test/");
        Host::join(Meeting { rank, size, one_machine: true, store, patience: PATIENCE }, PATIENCE).unwrap()
    };
    std::thread::scope(|scope| {
        let (join, work) = (&join, &work);
        let ranks: Vec<_> = (0..size).map(|rank| scope.spawn(move || work(&mut join(rank)))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
