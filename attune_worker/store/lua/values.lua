-- Fragment: time, and values as they are read from keys that anybody may have written to.
--
-- now_in_ms()            Redis' own clock; no worker's clock ever decides
-- integer(n)             a number as the text that Redis' integer commands take (Lua itself would write 1e+15)
-- number(text, default)  a finite number, or the default for anything else
-- own(key, type)         makes sure that a key can be used: a value of another type is foreign, and deleted
-- read(key, ...)         HMGET: the fields' values (false where missing) as a table
-- whole(key)             HGETALL: a table from field to value
local function now_in_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function integer(n)
  return string.format('%.0f', n)
end

local function number(text, default)
  local n = tonumber(text)
  if not n or n ~= n or n == math.huge or n == -math.huge then
    return default
  end
  return n
end

local function own(key, type)
  local found = redis.call('TYPE', key).ok
  if found ~= type and found ~= 'none' then
    redis.call('DEL', key)
  end
end

local function read(key, ...)
  local values = redis.pcall('HMGET', key, ...)
  if values.err then
    redis.call('DEL', key)
    values = redis.call('HMGET', key, ...)
  end
  return values
end

local function whole(key)
  local pairs_of = redis.pcall('HGETALL', key)
  local found = {}
  if pairs_of.err then
    redis.call('DEL', key)
    return found
  end
  for i = 1, #pairs_of, 2 do
    found[pairs_of[i]] = pairs_of[i + 1]
  end
  return found
end
