//! Where no launcher serves the store, rank 0 does, as under `srun` and `mpirun`: it must be there as long as another rank needs it.

mod common;

use common::Project;
use common::ranks::{rank_of, train};
use ddpm_dist::rendezvous::store::Client;
use std::net::TcpListener;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn rank_0_leaves_after_those_who_use_its_store() {
    let (project, port) = (Project::new(), TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    let start = |rank: usize| {
        let mut command = project.program();
        rank_of(command.args(train("run", &[])), [rank, 2], "127.0.0.1", port);
        project.start(&format!("rank-{rank}"), command)
    };
    let mut first = start(0);
    // Someone who is slow to leave.
    let mut slow = Client::connect("127.0.0.1", port, "test/", PATIENCE).unwrap();
    slow.set("here", b"").unwrap();
    let (code, stderr) = start(1).wait();
    assert_eq!(code, Some(0), "{stderr}");
    first.until_said("done: 20 steps");
    std::thread::sleep(Duration::from_millis(200));
    assert!(first.child.try_wait().unwrap().is_none(), "rank 0 has left: {}", first.stderr());
    assert!(slow.has("here").unwrap());
    drop(slow);
    let since = Instant::now();
    let (code, stderr) = first.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(since.elapsed() < Duration::from_secs(2), "it waits for nobody: {:?}", since.elapsed());
}
