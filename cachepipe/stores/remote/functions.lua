#!lua name=cachepipe1
-- Compares and sets the rows of one key of a store; decides nothing. KEYS are its hashes: rows, samples, pending.

local DIGEST = 8

local function hash_of(keys, field)
  local prefix = string.sub(field, 1, 2)
  if prefix == 's/' then return keys[2] end
  if prefix == 'p/' then return keys[3] end
  return keys[1]
end

local function row_of(keys, field)
  return redis.call('HGET', hash_of(keys, field), field)
end

local function byte_of(digits)
  return string.char(tonumber(digits, 16))
end

-- Adds what a followed row names: samples, or a field that is followed too.
local function follow(keys, row, more)
  if not row then return end
  local named = string.match(row, '^[^\n]*', DIGEST + 1)
  if string.sub(named, 1, 1) == '=' then
    local field = string.gsub(string.sub(named, 2), '%x%x', byte_of)
    local found = row_of(keys, field)
    if not found then return end
    more[#more + 1] = field
    more[#more + 1] = found
    if string.sub(found, DIGEST + 1, DIGEST + 1) == '=' then return end
    return follow(keys, found, more)
  end
  for index in string.gmatch(named, '%d+') do
    local field = 's/' .. index
    local sample = redis.call('HGET', keys[2], field)
    if sample then
      more[#more + 1] = field
      more[#more + 1] = sample
    end
  end
end

-- read: (with pending?), (count of followed fields), followed fields ..., fields ...
-- Returns the rows of the fields, and a list of further fields and rows.
local function read(keys, args)
  local followed = tonumber(args[2])
  local rows, more, found = {}, {}, {}
  for at = 3 + followed, #args do
    local row = row_of(keys, args[at])
    rows[#rows + 1] = row
    found[args[at]] = row
  end
  for at = 3, 2 + followed do
    local row = found[args[at]]
    if row == nil then row = row_of(keys, args[at]) end
    follow(keys, row, more)
  end
  if args[1] == '1' then
    local pending = redis.call('HGETALL', keys[3])
    for at = 1, #pending do more[#more + 1] = pending[at] end
  end
  return {rows, more}
end

-- some: fields, and beginnings of fields that end with a slash ...
-- Returns the fields and rows that there are, apart from samples.
local function some(keys, args)
  local found, wanted = {}, {}
  for _, field in ipairs(args) do
    if field == 'p/' then
      found = redis.call('HGETALL', keys[3])
    elseif string.sub(field, -1) == '/' then
      wanted[field] = true
    end
  end
  local fields = {}
  if next(wanted) then
    for _, field in ipairs(redis.call('HKEYS', keys[1])) do
      if wanted[string.sub(field, 1, 2)] then fields[#fields + 1] = field end
    end
  end
  for _, field in ipairs(args) do
    if string.sub(field, -1) ~= '/' then fields[#fields + 1] = field end
  end
  for _, field in ipairs(fields) do
    local row = redis.call('HGET', keys[1], field)
    if row then
      found[#found + 1] = field
      found[#found + 1] = row
    end
  end
  return found
end

-- swap: KEYS also has the receipt of the process, and the turn.
-- ARGV: nonce, process, fair?, milliseconds of a turn, milliseconds of a receipt or 0 for none, channel, key,
-- count of rows or -1 if that does not matter, count, fields and digests ...,
-- count, first byte of discarded samples, fields of samples that are wanted ...,
-- count, fields and rows ..., fields to delete ...
-- Returns 0 and the rows that are wanted if it was performed, else 1 or, while it is another's turn, 2, and the current rows.
local function swap(keys, args)
  local nonce, who, fair = args[1], args[2], args[3] == '1'
  local at, wanted, missing = 10 + 2 * tonumber(args[9]), {}, false
  local gone = args[at + 1]
  for number = 1, tonumber(args[at]) do
    local row = redis.call('HGET', keys[2], args[at + 1 + number])
    wanted[number] = row
    if not row or string.sub(row, 1, #gone) == gone then missing = true end
  end
  local puts_at = at + 2 + tonumber(args[at])
  if redis.call('GET', keys[4]) == nonce then return {0, wanted} end
  local turn = redis.call('GET', keys[5])
  local reserved = fair and turn and turn ~= who
  local whole = tonumber(args[8])
  local rows, changed = {}, missing or (whole >= 0 and redis.call('HLEN', keys[1]) ~= whole)
  at = 10
  for number = 1, tonumber(args[9]) do
    local row = row_of(keys, args[at])
    rows[number] = row
    if (row and string.sub(row, 1, DIGEST) or '') ~= args[at + 1] then changed = true end
    at = at + 2
  end
  if reserved or changed then
    if fair and not turn then redis.call('SET', keys[5], who, 'PX', args[4]) end
    return {reserved and 2 or 1, rows}
  end
  local puts = tonumber(args[puts_at])
  at = puts_at + 1
  for _ = 1, puts do
    redis.call('HSET', hash_of(keys, args[at]), args[at], args[at + 1])
    at = at + 2
  end
  for place = at, #args do
    redis.call('HDEL', hash_of(keys, args[place]), args[place])
  end
  if args[5] ~= '0' then redis.call('SET', keys[4], nonce, 'PX', args[5]) end
  if turn == who then redis.call('DEL', keys[5]) end
  if args[6] ~= '' then redis.call('PUBLISH', args[6], args[7]) end
  return {0, wanted}
end

redis.register_function{function_name = 'cachepipe1_read', callback = read, flags = {'no-writes'}}
redis.register_function{function_name = 'cachepipe1_some', callback = some, flags = {'no-writes'}}
redis.register_function('cachepipe1_swap', swap)
