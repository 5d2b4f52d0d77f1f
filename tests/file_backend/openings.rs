//! One writer, and readers beside it.

use super::*;

#[tokio::test]
async fn one_writer_at_a_time_and_readers_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let second = FileBackend::new(&options(folder.path()));
    let error = second.initialize().await.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), StoreErrorKind::Busy);
    // Nobody is told to stop himself.
    assert!(text.contains(&format!("by this process (pid {}", std::process::id())) && !text.contains("stop it"), "{text}");
    let seen = reader(folder.path()).await;
    assert_eq!(all(&seen).await, all(&backend).await);
    // What is committed now, is seen now.
    for second in 1..20 {
        set(&backend, "run_1", "node", NodeUpdate::running().attempt(u32::try_from(second).unwrap()), second).await;
        assert_eq!(all(&seen).await, all(&backend).await);
        if second % 5 == 0 {
            backend.checkpoint().await.unwrap();
        }
    }
    let error = seen.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert!(error.kind() == StoreErrorKind::Busy && error.to_string().contains("pid"), "{error}");
    let holders = seen.processes().await.unwrap();
    assert_eq!(holders[0].process, backend.process().unwrap());
    backend.close().await.unwrap();
    assert!(seen.processes().await.unwrap().is_empty());
    let error = seen.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::ReadOnly);
    second.initialize().await.unwrap();
}

#[tokio::test]
async fn one_backend_that_is_opened_twice_at_once_is_open() {
    let folder = tempfile::tempdir().unwrap();
    let backend = FileBackend::new(&options(folder.path()));
    let (first, second) = tokio::join!(backend.initialize(), backend.initialize());
    first.unwrap();
    second.unwrap();
    create(&backend, "run_1", 0).await;
    backend.initialize().await.unwrap();
}

/// Its thread goes on for a moment, and is in nobody's way.
#[tokio::test]
async fn an_opening_that_is_given_up_is_none_to_be_refused_by() {
    let filled = tempfile::tempdir().unwrap();
    let writer = open(filled.path()).await;
    create(&writer, "run_1", 0).await;
    for second in 1..100 {
        let update = NodeUpdate::success().metadata("text", "x".repeat(50_000));
        set(&writer, "run_1", &format!("node_{second}"), update, second).await;
    }
    for round in 0..5 {
        // As a crash leaves it: there is something to recover.
        let folder = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(filled.path()).unwrap() {
            let file = file.unwrap();
            match std::fs::copy(file.path(), folder.path().join(file.file_name())) {
                // What the writer makes beside its document has another name by now.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                copied => drop(copied.unwrap()),
            }
        }
        let backend = FileBackend::new(&options(folder.path()));
        let mut opening = backend.initialize();
        assert!(once(&mut opening).await, "round {round}: it takes a moment");
        // It holds the lock by now.
        std::thread::sleep(std::time::Duration::from_millis(5));
        drop(opening);
        backend.initialize().await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        backend.close().await.unwrap();
    }
}

#[tokio::test]
async fn who_closes_while_it_is_opened_has_closed_it() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let backend = FileBackend::new(&options(folder.path()));
        let mut opening = backend.initialize();
        assert!(once(&mut opening).await, "round {round}: it takes a moment");
        let given_up = round % 2 == 0;
        let opening = if given_up { None } else { Some(opening) };
        backend.close().await.unwrap();
        let other = open(folder.path()).await;
        if let Some(opening) = opening {
            assert_eq!(opening.await.unwrap_err().kind(), StoreErrorKind::Closed, "round {round}");
        }
        other.close().await.unwrap();
        // It may be opened again, as any that was closed.
        backend.initialize().await.unwrap();
        backend.close().await.unwrap();
    }
}

/// Polls once; whether it has not come to its end.
async fn once<F: std::future::Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await
}

/// What a crash left lying is removed by who holds the lock, and by nobody else: it may be somebody's work of this moment.
#[tokio::test]
async fn only_who_holds_the_lock_sweeps() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let left = folder.path().join(".run_state.json.tmp-left");
    std::fs::write(&left, "half").unwrap();
    let second = FileBackend::new(&options(folder.path()));
    assert_eq!(second.initialize().await.unwrap_err().kind(), StoreErrorKind::Busy);
    assert!(left.exists(), "a writer that was refused");
    let seen = reader(folder.path()).await;
    assert_eq!(all(&seen).await.len(), 1);
    backend.close().await.unwrap();
    let alone = reader(folder.path()).await;
    assert!(alone.verify().await.unwrap().is_sound());
    assert_eq!(all(&alone).await.len(), 1);
    assert!(left.exists(), "readers, beside a writer and alone");
    second.initialize().await.unwrap();
    assert!(!left.exists());
}

#[tokio::test]
async fn a_read_only_opening_makes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("not").join("there");
    let seen = reader(&missing).await;
    assert!(all(&seen).await.is_empty());
    assert!(!missing.exists());
    std::fs::copy("tests/fixtures/guide-sample/run_state.json", document(folder.path())).unwrap();
    let seen = reader(folder.path()).await;
    assert_eq!(all(&seen).await.len(), 1);
    seen.close().await.unwrap();
    assert_eq!(names(folder.path()), ["run_state.json"]);
}

#[tokio::test]
async fn leases_of_a_live_writer_are_listed_by_others_and_die_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let record = hold(&backend);
    let seen = reader(folder.path()).await;
    wait_for(async || seen.list_leases().await.unwrap() == vec![record.clone()]).await;
    // Writing goes over the provisional frame; the leases stay listed.
    for second in 1..10 {
        set(&backend, "run_1", "node", NodeUpdate::running().attempt(u32::try_from(second).unwrap()), second).await;
        assert_eq!(seen.list_leases().await.unwrap(), vec![record.clone()], "at once, not at the next tick");
    }
    let killed = tempfile::tempdir().unwrap();
    copy_folder(folder.path(), killed.path());
    assert!(reader(killed.path()).await.list_leases().await.unwrap().is_empty(), "no writer, no leases");
    assert_eq!(all(&open(killed.path()).await).await, all(&backend).await);
    // A write that is fenced by a lease which is gone is refused.
    let version = version(&backend, "run_1").await;
    let fenced = |token| Entry {
        parts: vec![part("run_1", version, vec![Mutation::DeleteNode { node: node_id("node") }])],
        fences: vec![Fence { key: record.key.clone(), token: FencingToken(token) }],
        ..Entry::default()
    };
    let answer = backend.commit(Arc::new(Batch::new(vec![fenced(2), fenced(3)]))).await.unwrap();
    assert!(matches!(&answer.outcomes[0], Outcome::Refused(Refusal::Fenced { .. })));
    book(&backend).remove(&record.key, FencingToken(3));
    wait_for(async || seen.list_leases().await.unwrap().is_empty()).await;
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_is_a_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = FileBackend::new(&options(&file.join("target"))).initialize().await.unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
    let unopened = FileBackend::new(&options(folder.path()));
    let error = unopened.commit(Arc::new(Batch::new(vec![]))).await.unwrap_err();
    assert!(error.to_string().contains("initialize"), "{error}");
    assert_eq!(repair(&folder.path().join("nowhere"), at(0), false).unwrap_err().kind(), StoreErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_beside_a_writer_that_checkpoints_never_sees_less_than_was_acknowledged_before() {
    let folder = tempfile::tempdir().unwrap();
    let backend = Arc::new(open(folder.path()).await);
    create(&backend, "run_1", 0).await;
    let acknowledged = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reading = tokio::spawn({
        let (folder, acknowledged, done) = (folder.path().to_owned(), Arc::clone(&acknowledged), Arc::clone(&done));
        async move {
            let mut looks = 0;
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                let before = acknowledged.load(std::sync::atomic::Ordering::SeqCst);
                let seen = reader(&folder).await;
                let run = seen.load_run(&run_id("run_1")).await.unwrap().unwrap();
                assert!(run.version().0 >= before, "{} is seen, {before} was acknowledged", run.version());
                looks += 1;
            }
            looks
        }
    });
    let writing = async {
        for second in 0..150 {
            let receipt = set(&backend, "run_1", "node", NodeUpdate::running().attempt(second), 1).await;
            acknowledged.store(receipt.runs[0].after.0, std::sync::atomic::Ordering::SeqCst);
            if second % 3 == 0 {
                backend.checkpoint().await.unwrap();
            }
        }
    };
    writing.await;
    backend.close().await.unwrap();
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(reading.await.unwrap() > 0);
}

/// The journal that they were noted in is gone: the next one has them too.
#[tokio::test]
async fn leases_stay_listed_where_the_journal_was_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    let record = hold(&backend);
    let seen = reader(folder.path()).await;
    wait_for(async || seen.list_leases().await.unwrap() == vec![record.clone()]).await;
    std::fs::remove_file(journal(folder.path())).unwrap();
    set(&backend, "run_1", "n", NodeUpdate::success(), 1).await;
    wait_for(async || seen.list_leases().await.unwrap() == vec![record.clone()]).await;
}

/// Nothing is in the making any more when the lock is given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_opens_right_after_a_close_finds_nothing_unfinished() {
    let folder = tempfile::tempdir().unwrap();
    let backend = open(folder.path()).await;
    create(&backend, "run_1", 0).await;
    // So long a journal is worth space that is made ready for the next one.
    for second in 1..30 {
        set(&backend, "run_1", "n", NodeUpdate::running().metadata("text", "x".repeat(200_000)), second).await;
    }
    let mut checkpoint = backend.checkpoint();
    assert!(once(&mut checkpoint).await, "it takes a moment");
    let next = tokio::spawn({
        let folder = folder.path().to_owned();
        async move {
            let begun = std::time::Instant::now();
            loop {
                match FileBackend::new(&options(&folder)).initialize().await {
                    Ok(report) => return report.notices,
                    Err(error) => assert!(begun.elapsed().as_secs() < 20, "{error}"),
                }
            }
        }
    });
    backend.close().await.unwrap();
    checkpoint.await.unwrap();
    assert_eq!(next.await.unwrap(), Vec::<String>::new());
}
