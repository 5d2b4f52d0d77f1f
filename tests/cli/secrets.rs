//! What is secret goes to the server that it is for, and to no other.
#![cfg(all(feature = "cli", feature = "postgres", feature = "libsql"))]

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::{seeknal, told};

const SECRET: &str = "hunter2hunter2";

/// A server that keeps what it is sent, and answers as it is told. It ends with the test.
fn server(answer: impl Fn(&mut TcpStream, &[u8]) + Send + 'static) -> (u16, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (heard, hears) = mpsc::channel();
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = client.read(&mut bytes) {
                if heard.send(bytes[..length].to_vec()).is_err() {
                    return;
                }
                answer(&mut client, &bytes[..length]);
            }
        }
    });
    (port, hears)
}

fn contains(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

/// All that came so far: it is noted before it is answered.
fn all(hears: &mpsc::Receiver<Vec<u8>>) -> Vec<u8> {
    hears.try_iter().flatten().collect()
}

/// A move from another server, whose secrets the URL has not.
fn moves(settings: &str, from: &str, variable: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seeknal_project.yml"), settings).unwrap();
    let (code, out, err) =
        told(seeknal(dir.path()).env(variable, SECRET).args(["migrate-state", "--backend", "database", "--from", from]));
    assert!(code != 0 && !out.contains(SECRET) && !err.contains(SECRET), "{code}: {out}{err}");
    err
}

#[test]
fn the_password_of_the_environment_is_for_the_server_of_the_settings() {
    // No TLS, then: say your password in clear.
    let asks = |client: &mut TcpStream, bytes: &[u8]| {
        let answer: &[u8] = if bytes.len() == 8 { b"N" } else { b"R\0\0\0\x08\0\0\0\x03" };
        client.write_all(answer).unwrap();
    };
    let (named, named_hears) = server(asks);
    let (other, other_hears) = server(asks);
    let settings = format!("state_backend: database\ndatabase_url: postgres://me@127.0.0.1:{named}/d\n");
    let err = moves(&settings, &format!("postgres://me@127.0.0.1:{other}/d"), "SEEKNAL_DATABASE_PASSWORD");
    assert!(err.contains("password"), "{err}");
    let heard = all(&other_hears);
    assert!(contains(&heard, "me") && !contains(&heard, SECRET), "it was asked, and told the password of another");
    moves(&settings, &format!("postgres://me@127.0.0.1:{named}/other"), "SEEKNAL_DATABASE_PASSWORD");
    assert!(contains(&all(&named_hears), SECRET), "the server of the settings is told");
}

/// One host may have two servers: the token of the one behind TLS is not sent to the other in clear.
#[test]
fn the_token_of_a_server_is_not_sent_to_another_port() {
    let refuses = |client: &mut TcpStream, _: &[u8]| {
        let _gone = client.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").is_err();
    };
    let (port, hears) = server(refuses);
    for named in ["libsql://127.0.0.1".to_owned(), format!("libsql://127.0.0.1:{port}"), "http://127.0.0.1".to_owned()] {
        moves(
            &format!("state_backend: database\ndatabase_url: {named}\n"),
            &format!("http://127.0.0.1:{port}"),
            "SEEKNAL_DATABASE_TOKEN",
        );
        let heard = all(&hears);
        assert!(!heard.is_empty() && !contains(&heard, SECRET), "{named}");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("seeknal_project.yml"),
        format!("state_backend: database\ndatabase_url: http://127.0.0.1:{port}\n"),
    )
    .unwrap();
    told(seeknal(dir.path()).env("SEEKNAL_DATABASE_TOKEN", SECRET).args(["state", "runs"]));
    assert!(contains(&all(&hears), SECRET), "its own server is told");
}
