//! A store that many ranks come to, in a process with few file descriptors: this test program, started again under a limit.

use crate::rendezvous::testing::{client, server};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

const ROLE: &str = "DDPM_DIST_TEST_CROWD";

/// Starts the test below as `role`, with a limit of open files as `ulimit` takes it.
fn start(role: &str, limit: &str) -> Child {
    let program = std::env::current_exe().unwrap();
    let test = "rendezvous::tests::crowd::takes_a_role";
    let script = format!("ulimit {limit}; exec {} --exact --nocapture {test}", program.display());
    let mut command = Command::new("sh");
    command.args(["-c", &script]).env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn takes_a_role() {
    match std::env::var(ROLE).as_deref() {
        Ok("crowd") => {
            let server = server();
            let mut clients: Vec<_> = (0..300).map(|_| client(server.address().port(), "")).collect();
            assert!(clients.iter_mut().all(|client| !client.has("key").unwrap()));
        }
        Ok("server") => {
            let server = server();
            println!("\nport {}", server.address().port());
            // Until the other side closes it.
            std::io::stdin().read_line(&mut String::new()).unwrap();
        }
        _ => {}
    }
}

#[test]
fn a_soft_limit_of_open_files_keeps_nobody_out() {
    let output = start("crowd", "-Sn 256").wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_store_that_can_take_no_more_says_so() {
    let mut child = start("server", "-n 48");
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (mut stdout, mut stderr) = (BufReader::new(stdout), BufReader::new(stderr));
    let lines = stdout.by_ref().lines().map_while(Result::ok);
    let port: u16 = lines.filter_map(|line| line.strip_prefix("port ")?.parse().ok()).next().unwrap();
    let crowd: Vec<TcpStream> = (0..60).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let mut said = String::new();
    stderr.read_line(&mut said).unwrap();
    assert!(said.contains("the store in which the ranks meet takes no more than") && said.contains("ulimit"), "{said}");
    drop((crowd, child.stdin.take()));
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    assert!(child.wait().unwrap().success());
}
