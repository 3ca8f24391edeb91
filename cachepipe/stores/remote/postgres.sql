-- The tables and functions of a cache in a PostgreSQL database. They compare and set rows, and decide nothing.
-- The client replaces SCHEMA by the name of the schema.
-- The settings of the functions keep one plan, which finds each row by its index: planning takes longer.

create table SCHEMA.meta (format int not null, identity text not null, changes bigint not null default 0);

-- The last changes that were announced; meta has the number of the last one.
create table SCHEMA.changes (number bigint primary key, key bytea not null);

-- The lock of a key; the process for which it is reserved, until when (seconds since 1970); and the last swap
-- of each process: {process: [nonce, when]}.
create table SCHEMA.keys (
  key bytea primary key,
  turn bigint,
  until float8 not null default 0,
  receipts jsonb not null default '{}'
) with (fillfactor = 70);

create table SCHEMA.ledger (
  key bytea,
  field bytea,
  long bytea,  -- the field, where it is too long for an index
  content bytea not null,
  primary key (key, field)
) with (fillfactor = 80);

create table SCHEMA.samples (key bytea, field bytea, content bytea not null, primary key (key, field));

create table SCHEMA.leases (lease bigint primary key, name bytea not null, until float8 not null);

create function SCHEMA.seconds() returns float8 language sql volatile as $$
  select extract(epoch from clock_timestamp())::float8
$$;

create function SCHEMA.short(_field bytea) returns bytea language sql immutable as $$
  select case when length(_field) <= 1000 then _field else substring(_field, 1, 2) || sha256(_field) end
$$;

-- Returns what is named at the beginning of a row that is followed.
create function SCHEMA.named(_row bytea) returns text[] language sql immutable as $$
  select string_to_array(
    encode(substring(_row, 9, greatest(position('\x0a'::bytea in substring(_row, 9)) - 1, 0)), 'escape'), ','
  )
$$;

-- Announces a change of each key; returns the number of the last one. The lock of the row lasts until all of
-- them can be seen, so that nobody sees a later one before.
create function SCHEMA.announce(_keys bytea[], _kept int) returns bigint language plpgsql volatile
set lock_timeout = '4s' as $$
declare
  _last bigint;
begin
  if current_setting('synchronous_commit') in ('off', 'local') then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  update SCHEMA.meta set changes = changes + cardinality(_keys) returning changes into _last;
  insert into SCHEMA.changes (number, key)
    select _last - cardinality(_keys) + a.place, a.key from unnest(_keys) with ordinality as a (key, place);
  delete from SCHEMA.changes where number <= _last - _kept;
  return _last;
end
$$;

-- Returns the rows of fields, of samples, of the samples that followed fields name, and of pending indices.
-- Each is given as the number of its key and a field.
create function SCHEMA.read(
  _keys bytea[], _of int[], _fields bytea[], _samples_of int[], _samples bytea[],
  _follow_of int[], _follow bytea[], _pending_of int[]
) returns table (number int, field bytea, content bytea) language plpgsql stable
set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off
set enable_seqscan = off set jit = off as $$
#variable_conflict use_column
begin
  return query
    select a.number, coalesce(l.long, l.field), l.content from unnest(_of, _fields) as a (number, field)
    join SCHEMA.ledger l on l.key = _keys[a.number] and l.field = SCHEMA.short(a.field);
  if cardinality(_samples) > 0 then
    return query
      select a.number, s.field, s.content from unnest(_samples_of, _samples) as a (number, field)
      join SCHEMA.samples s on s.key = _keys[a.number] and s.field = a.field;
  end if;
  if cardinality(_follow) > 0 then
    return query
      with named as (
        select a.number, n.name from unnest(_follow_of, _follow) as a (number, field)
        join SCHEMA.ledger l on l.key = _keys[a.number] and l.field = SCHEMA.short(a.field)
        cross join lateral unnest(SCHEMA.named(l.content)) as n (name)
      ), led as (
        select n.number, l.field, l.long, l.content from named n
        join SCHEMA.ledger l on l.key = _keys[n.number]
          and l.field = SCHEMA.short(decode(case when n.name like '=%' then substr(n.name, 2) end, 'hex'))
      )
      select l.number, coalesce(l.long, l.field), l.content from led l
      union all
      select i.number, s.field, s.content from (
        select n.number, n.name from named n
        union all
        select l.number, n.name from led l cross join lateral unnest(SCHEMA.named(l.content)) as n (name)
      ) as i
      join SCHEMA.samples s on s.key = _keys[i.number] and s.field = ('s/' || i.name)::bytea;
  end if;
  if cardinality(_pending_of) > 0 then
    return query
      select a.number, l.field, l.content from unnest(_pending_of) as a (number)
      join SCHEMA.ledger l on l.key = _keys[a.number] and l.field >= 'p/'::bytea and l.field < 'p0'::bytea;
  end if;
end
$$;

-- Performs swaps, each of another key; see engine.py. Expected digests are empty where there was no row, and
-- the expected number of rows is -1 where it does not matter.
-- Returns for each swap that wrote nothing its number and whether its key is reserved, then the current rows;
-- for the others the samples that they want.
create function SCHEMA.swap(
  _keys bytea[], _nonces bytea[], _fair int[], _wholes int[], _who bigint, _turn float8, _receipt float8,
  _of int[], _fields bytea[], _digests bytea[], _wants_of int[], _wants bytea[], _gone bytea,
  _puts_of int[], _puts bytea[], _contents bytea[], _deletes_of int[], _deletes bytea[]
) returns table (number int, reserved boolean, field bytea, content bytea) language plpgsql volatile
set lock_timeout = '4s' set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off
set enable_seqscan = off set jit = off as $$
#variable_conflict use_column
declare
  _locked int;
  _changed int[];
  _states int[];
  _now float8;
begin
  if current_setting('synchronous_commit') in ('off', 'local') then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  -- The locks are taken in order. What follows must see what was written before they were free.
  insert into SCHEMA.keys (key)
    select a.key from unnest(_keys) as a (key)
    where not exists (select from SCHEMA.keys k where k.key = a.key) order by a.key
    on conflict do nothing;
  perform from SCHEMA.keys k where k.key = any (_keys) order by k.key for update;
  get diagnostics _locked = row_count;
  if _locked < cardinality(_keys) then
    raise serialization_failure using message = 'a key was added meanwhile';
  end if;
  _now := SCHEMA.seconds();
  _changed := array(
    select distinct e.number from unnest(_of, _fields, _digests) as e (number, field, digest)
    left join SCHEMA.ledger l on l.key = _keys[e.number] and l.field = SCHEMA.short(e.field)
    left join SCHEMA.samples s on s.key = _keys[e.number] and s.field = e.field
    where coalesce(substring(coalesce(l.content, s.content), 1, 8), ''::bytea) <> e.digest
  );
  if cardinality(_wants) > 0 then
    _changed := _changed || array(
      select distinct w.number from unnest(_wants_of, _wants) as w (number, field)
      left join SCHEMA.samples s on s.key = _keys[w.number] and s.field = w.field
      where coalesce(substring(s.content, 1, length(_gone)), _gone) = _gone
    );
  end if;
  if 0 <= any (_wholes) then
    _changed := _changed || array(
      select a.number::int from unnest(_keys, _wholes) with ordinality as a (key, whole, number)
      where a.whole >= 0 and a.whole <> (
        select count(*) from SCHEMA.ledger l
        where l.key = a.key and not (l.field >= 'p/'::bytea and l.field < 'p0'::bytea)
      )
    );
  end if;
  _states := array(  -- 0: performed before, 1: changed, 2: reserved, 3: to perform
    select case
      when k.receipts -> _who::text ->> 0 = encode(a.nonce, 'hex')
        and (k.receipts -> _who::text ->> 1)::float8 > _now - _receipt then 0
      when a.fair = 1 and k.turn <> _who and k.until > _now then 2
      when a.number = any (_changed) then 1
      else 3 end
    from unnest(_keys, _nonces, _fair) with ordinality as a (key, nonce, fair, number)
    join SCHEMA.keys k on k.key = a.key order by a.number
  );
  if 1 = any (_states) or 2 = any (_states) then
    update SCHEMA.keys k set turn = _who, until = _now + _turn
      from unnest(_keys, _fair, _states) as a (key, fair, state)
      where k.key = a.key and a.fair = 1 and a.state in (1, 2) and k.until <= _now;
    return query
      select a.number::int, a.state = 2, null::bytea, null::bytea
      from unnest(_states) with ordinality as a (state, number) where a.state in (1, 2);
    return query
      select e.number, null::boolean, coalesce(l.long, l.field, s.field), coalesce(l.content, s.content)
      from unnest(_of, _fields) as e (number, field)
      left join SCHEMA.ledger l on l.key = _keys[e.number] and l.field = SCHEMA.short(e.field)
      left join SCHEMA.samples s on s.key = _keys[e.number] and s.field = e.field
      where _states[e.number] in (1, 2) and coalesce(l.field, s.field) is not null;
  end if;
  if cardinality(_wants) > 0 then
    return query
      select w.number, null::boolean, s.field, s.content from unnest(_wants_of, _wants) as w (number, field)
      join SCHEMA.samples s on s.key = _keys[w.number] and s.field = w.field
      where _states[w.number] in (0, 3);
  end if;
  insert into SCHEMA.ledger (key, field, long, content)
    select _keys[p.number], SCHEMA.short(p.field), nullif(p.field, SCHEMA.short(p.field)), p.content
    from unnest(_puts_of, _puts, _contents) as p (number, field, content)
    where _states[p.number] = 3 and substring(p.field, 1, 2) <> 's/'::bytea
    on conflict (key, field) do update set content = excluded.content;
  insert into SCHEMA.samples (key, field, content)
    select _keys[p.number], p.field, p.content
    from unnest(_puts_of, _puts, _contents) as p (number, field, content)
    where _states[p.number] = 3 and substring(p.field, 1, 2) = 's/'::bytea
    on conflict (key, field) do update set content = excluded.content;
  if cardinality(_deletes) > 0 then
    delete from SCHEMA.ledger l using unnest(_deletes_of, _deletes) as d (number, field)
      where _states[d.number] = 3 and l.key = _keys[d.number] and l.field = SCHEMA.short(d.field);
    delete from SCHEMA.samples s using unnest(_deletes_of, _deletes) as d (number, field)
      where _states[d.number] = 3 and s.key = _keys[d.number] and s.field = d.field;
  end if;
  update SCHEMA.keys k set
      turn = nullif(k.turn, _who),
      until = case when k.turn = _who then 0 else k.until end,
      receipts = jsonb_build_object(_who::text, jsonb_build_array(encode(a.nonce, 'hex'), _now)) || (
        select coalesce(jsonb_object_agg(r.key, r.value), '{}') from jsonb_each(k.receipts) as r
        where r.key <> _who::text and (r.value ->> 1)::float8 > _now - _receipt
      )
    from unnest(_keys, _nonces, _states) as a (key, nonce, state) where k.key = a.key and a.state = 3;
end
$$;
